"""Answers that a scorer evaluates: what eval would give, without what eval would do."""

import functools
import socket

import pytest

from rltk.errors import ConfigError, InfrastructureError
from rltk.rewards.jailed import NoValueError, evaluate, scoring_jail, with_jailed_eval
from rltk.rollout.tools.types import ToolResult
from rltk.tasks.reasoning_gym import JAILED, ReasoningGym

jail = functools.partial(scoring_jail, "best_effort")


class Broken:
    """A jail that cannot start a process."""

    def run(self, source, stdin):
        return ToolResult("infra_error", "no memory for a process")


class Refusing:
    def run(self, source, stdin):
        raise AssertionError(f"a literal needs no jail: {stdin}")


@pytest.mark.parametrize("text", ["[[0, 1], [1, 0]]", "('a', 'b')", " {1: 2}", "'a\\nb'", "-1.5", "None"])
def test_literals_are_read_here(text):
    assert evaluate(text, Refusing()) == eval(text.strip())


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("[[0] * 2 for _ in range(2)]", [[0, 0], [0, 0]]),
        ("range(3)", [0, 1, 2]),
        ("(chr(97 + i) for i in range(3))", ["a", "b", "c"]),
        ("'\\n'.join('ab')", "a\nb"),
        ("print('[9]') or [1]", [1]),
        ("2 ** 100", 2**100),
    ],
)
def test_expressions_have_the_value_that_eval_gives(text, value):
    assert evaluate(text, jail()) == value


@pytest.mark.parametrize(
    "text",
    ["1 +", "x", "object()", "exit()", "1 / 0", "[" * 300, "\x00", "(lambda f: f(f))(lambda f: f(f))", "+1" * 20_000],
)
def test_what_has_no_value(text):
    with pytest.raises(NoValueError):
        evaluate(text, jail())


def test_an_answer_that_does_something_does_it_nowhere(tmp_path):
    """Each of these works under eval; here none leaves a trace, and none learns anything."""
    secret, made = tmp_path / "secret", tmp_path / "made"
    secret.write_text("[1]")
    listener = socket.create_server(("127.0.0.1", 0))
    listener.setblocking(False)
    attacks = [
        f"__import__('os').system('touch {made}') == 0 and [1]",
        f"open({str(made)!r}, 'w') and [1]",
        f"eval(open({str(secret)!r}).read())",
        f"__import__('socket').create_connection({listener.getsockname()!r}) and [1]",
        "__import__('os').kill(__import__('os').getppid(), 9) or [1]",
        "__import__('os').fork() and [1]",
    ]
    for attack in attacks:
        try:
            assert evaluate(attack, jail()) != [1], attack
        except NoValueError:
            continue
    with pytest.raises(BlockingIOError):
        listener.accept()
    listener.close()
    assert not made.exists()


def swallowing(answer, reference):
    """As reasoning-gym's: whatever eval raises is a wrong answer."""
    if answer == reference:
        return 1.0
    try:
        return 0.1 if eval(answer) == reference else 0.0
    except Exception:
        return 0.0


def test_the_scorers_own_code_runs_with_another_eval():
    score = with_jailed_eval(swallowing, jail())
    assert score("open('x')", "open('x')") == 1.0, "it looks before it evaluates, as it always did"
    assert (score("[1]", [1]), score("[0 + 1]", [1]), score("[2]", [1])) == (0.1, 0.1, 0.0)
    for looking in ("reference", "__import__('sys')._getframe(1).f_locals['reference']"):
        assert score(looking, [1]) == 0.0
    with pytest.raises(ConfigError, match="does not call eval"):
        with_jailed_eval(reference, jail())


def test_a_failing_jail_is_no_wrong_answer():
    score = with_jailed_eval(swallowing, Broken())
    with pytest.raises(InfrastructureError, match="no memory for a process"):
        score("[0 + 1]", [1])
    assert score("[1]", [1]) == 0.1, "the next answer is scored"


def reference(task, record):
    """A right answer, and the same one as a Python value."""
    text = record.answer or record.data["metadata"]["valid_answers"][0]
    rows = [line.split() for line in text.split("\n")]
    return text, list(text) if task.dataset == "string_insertion" else rows[0] if len(rows) == 1 else rows


@pytest.mark.parametrize("dataset", JAILED)
def test_four_data_sets_score_as_ever_and_run_nothing(dataset, tmp_path):
    task, made = ReasoningGym(512, 512, dataset=dataset, isolation="best_effort"), tmp_path / "made"
    record = task.problem(0)
    text, value = reference(task, record)
    partly = 0.5 if dataset == "n_queens" else 0.1

    def score(answer):
        record_of = task.score(record, f"<answer>{answer}</answer>")
        return record_of.value, record_of.correct

    assert score(text) == (1.0, True)
    assert score(repr(value)) == score(f"{value!r} + []") == (partly, False)
    for attack in (
        f"__import__('os').system('touch {made}')",
        "entry['answer']",  # names that the scorer's own frame has
        "oracle_answer",
        "valid_solutions[0]",
        "__import__('sys')._getframe(1).f_locals",
    ):
        assert score(attack) == (0.0, False)
    assert not made.exists()


def test_a_sample_is_masked_and_not_wrong_where_the_jail_fails(monkeypatch):
    task = ReasoningGym(512, 512, dataset="spiral_matrix", isolation="best_effort")
    monkeypatch.setattr(type(jail()), "run", lambda *_, **__: ToolResult("infra_error", "gone"))
    with pytest.raises(InfrastructureError, match="gone"):  # the reward process masks the sample that raises
        task.score(task.problem(0), "<answer>[0 + 1]</answer>")


def test_the_isolation_is_one_of_two():
    with pytest.raises(ConfigError, match="task.isolation='remote' must be strict or best_effort"):
        ReasoningGym(512, 512, dataset="n_queens", isolation="remote")
