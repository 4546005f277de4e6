"""The mutation check can fail: on a tree of its own, with tests that see one mistake and not another."""

from pathlib import Path

import pytest

from tests.mutants.__main__ import ROOT, gather, mutants_of, report
from tests.mutants.check import Verdict, copy_of, judge
from tests.mutants.chosen import TABLES, chosen
from tests.mutants.operators import systematic
from tests.mutants.targets import files, suites_of

FILE = "algorithms/toy.py"
SOURCE = '''"""A toy."""


def mean(a, b):
    return (a + b) / 2
'''
TABLE = """sign: the difference
- a + b
+ a - b

nothing: other words
- A toy.
+ A game.
"""


@pytest.fixture
def tree(tmp_path):
    """A repository of one formula; its test does not see an error of less than 1."""
    for folder in ("rltk/algorithms", "tests"):
        Path(tmp_path, folder).mkdir(parents=True)
    for name in ("rltk/__init__.py", "rltk/algorithms/__init__.py", "tests/test_empty.py"):
        Path(tmp_path, name).write_text("def test_nothing():\n    assert True\n")
    Path(tmp_path, "rltk", FILE).write_text(SOURCE)
    Path(tmp_path, "tests/test_toy.py").write_text(
        "from rltk.algorithms.toy import mean\n\n\ndef test_mean():\n    assert abs(mean(2, 4) - 3) < 1\n"
    )
    return tmp_path


def verdicts(tree, mutants, test="tests/test_toy.py"):
    return list(judge(tree, mutants, lambda file: [test], workers=1, preloaded=("pytest",)))


def test_a_mutant_that_no_test_sees_or_a_wrong_excuse_fails_the_check(tree, capsys):
    found = verdicts(tree, [*chosen(FILE, SOURCE, TABLE), *systematic(FILE, SOURCE)[1:2]])
    outcome = {verdict.mutant.name: verdict.outcome for verdict in found}
    assert outcome == {
        "toy:the difference": "killed",
        "toy:other words": "survived",
        "toy:mean a + b -> a - b": "killed",
    }
    assert found[0].test == "tests/test_toy.py::test_mean"
    assert report(found, {}) == 1
    printed = capsys.readouterr().out
    assert "SURVIVED algorithms/toy.py:1 nothing: toy:other words\n" in printed and "3 mutants, 1 to see to" in printed
    assert report(found, {"toy:other words": "a docstring"}) == 0
    assert report(found[2:], {}) == 0
    assert Path(tree, "rltk", FILE).read_text() == SOURCE  # the mutants were never written

    _, reasons = mutants_of(FILE, SOURCE, TABLE + "\nequivalent: a guess\n= mean a + b -> a - b\n= other words\n")
    assert reasons == {"toy:mean a + b -> a - b": "a guess", "toy:other words": "a guess"}
    assert report(found, reasons) == 1
    assert "NOT EQUIVALENT algorithms/toy.py:5 toy:mean a + b -> a - b: tests/test_toy.py" in capsys.readouterr().out


def test_a_mutant_that_ran_out_of_time_is_neither_killed_nor_excused(capsys):
    (mutant,) = chosen(FILE, SOURCE, TABLE)[:1]
    assert report([Verdict(mutant, "timeout", "")], {mutant.name: "whatever"}) == 1
    assert "TIMEOUT algorithms/toy.py:5 sign: toy:the difference" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("table", "words"),
    [
        ("sign: gone\n- a * b\n+ a / b\n", "'gone' is found 0 times, not once:\na . b"),
        ("sign: often\n- b\n+ a\n", "'often' is found 2 times"),
        ("sign: no text\n+ a\n", "'no text' is found"),
        ("a line\n", "'a line' begins no block"),
        ("equivalent: who knows\n= mean a - b -> a + b\n", "no mutant of it: mean a - b -> a . b"),
    ],
)
def test_a_table_that_does_not_fit_its_file_is_an_error(table, words):
    with pytest.raises(ValueError, match=words):
        mutants_of(FILE, SOURCE, table)


def test_tests_that_fail_by_themselves_or_never_load_the_file_are_an_error(tree):
    mutants = chosen(FILE, SOURCE, TABLE)[:1]
    with pytest.raises(RuntimeError, match="rltk.algorithms.toy was never imported by tests/test_empty.py"):
        verdicts(tree, mutants, "tests/test_empty.py")
    Path(tree, "tests/test_empty.py").write_text("def test_nothing():\n    assert False\n")
    with pytest.raises(RuntimeError, match="failed tests/test_empty.py::test_nothing without any mutant"):
        verdicts(tree, mutants, "tests/test_empty.py")


SNIPPET = '''
def loss(self, batch, reduce, x: int = 1) -> int:
    """Text - with + signs."""
    if x is None:
        raise ValueError("x - 1")
    ratio = torch.where(batch.mask, batch.new - self.old.detach(), 0.0).exp()
    kept = (ratio <= 2) & ~self.off
    mean = reduce(ratio.sum(dim=-1)) / batch.mask.sum().clamp(min=1)
    return -torch.minimum(ratio, mean) if kept.any() else ratio.expand_as(batch.mask)
'''
CHANGES = """
constant 1 -> 2
mask batch.mask -> batch.mask | True
sign batch.new - self.old.detach() -> batch.new + self.old.detach()
detach self.old.detach() -> self.old
constant 0.0 -> 1.0
function torch.where(batch.mask, batch.new - self.old.detach(), 0.0).exp() -> torch.where(batch.mask, batch.new - self.old.detach(), 0.0)
condition (ratio <= 2) & ~self.off -> (ratio <= 2) | ~self.off
boundary ratio <= 2 -> ratio < 2
constant 2 -> 3
condition ~self.off -> self.off
factor reduce(ratio.sum(dim=-1)) / batch.mask.sum().clamp(min=1) -> reduce(ratio.sum(dim=-1)) * batch.mask.sum().clamp(min=1)
denominator reduce(ratio.sum(dim=-1)) -> ratio.sum(dim=-1)
axis ratio.sum(dim=-1) -> ratio.sum(dim=0)
bound batch.mask.sum().clamp(min=1) -> batch.mask.sum()
min-max batch.mask.sum().clamp(min=1) -> batch.mask.sum().clamp(max=1)
mask batch.mask -> batch.mask | True #2
constant 1 -> 2 #2
condition kept.any() -> not kept.any()
min-max kept.any() -> kept.all()
sign -torch.minimum(ratio, mean) -> torch.minimum(ratio, mean)
min-max torch.minimum(ratio, mean) -> torch.maximum(ratio, mean)
"""  # noqa: E501


def test_the_operators_break_a_formula_in_every_place_and_leave_words_alone():
    found = {f"{mutant.kind} {mutant.change}" for mutant in systematic("algorithms/x.py", SNIPPET)}
    assert found == set(CHANGES.strip().splitlines())


def test_every_file_with_a_formula_has_mutants_tests_and_a_table_that_fits():
    mutants, reasons = gather(ROOT)
    named = {mutant.file for mutant in mutants}
    assert named == set(files(ROOT)) and len({mutant.name for mutant in mutants}) == len(mutants)
    assert all(Path(ROOT, suite).is_file() for file in named for suite in suites_of(file))
    tables = {path.relative_to(TABLES).with_suffix(".py").as_posix() for path in TABLES.rglob("*.txt")}
    assert {f"algorithms/{table}" for table in tables} <= named
    assert len(reasons) < len(mutants) / 10, "a list of excuses this long hides holes"


def test_the_copy_is_of_the_tree_and_apart_from_it():
    with copy_of(ROOT, ("algorithms", "rltk", "pyproject.toml")) as copy:
        assert files(copy) == files(ROOT) and ROOT not in copy.parents
        assert Path(copy, "rltk", "algorithms").resolve() == (copy / "algorithms").resolve()
    assert not copy.exists()
