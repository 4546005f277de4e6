import os
import pickle
import random
import subprocess
import sys

import pytest

from rltk.compose import load
from rltk.errors import ConfigError
from rltk.tasks import build_task
from rltk.tasks.generated import is_held_out
from rltk.tasks.reasoning_gym import PARSED_BY_SYMPY, ReasoningGym, final_answer


def gym(dataset, **options):
    return ReasoningGym(512, 512, dataset=dataset, **options)


def question(record):
    return record.data["question"]


def test_it_is_built_from_the_command_line_with_the_data_sets_options():
    config = load(["task=reasoning_gym", "task.dataset=chain_sum", "task.options.max_terms=2", "task.longest=80"])
    task = build_task(config.task)
    questions = [question(task.problem(index)) for index in range(50)]
    assert all(text.count("+") + text.count("-") <= 2 and len(text) <= 80 for text in questions)


def test_training_and_held_out_problems_are_disjoint_under_every_seed():
    held_out = {question(record) for record in gym("chain_sum").held_out(40)}
    assert len(held_out) == 40 and held_out == {question(record) for record in gym("chain_sum", seed=3).held_out(40)}
    training = {question(gym("chain_sum", seed=seed).problem(index)) for seed in (0, 1) for index in range(300)}
    assert not any(map(is_held_out, training)) and all(map(is_held_out, held_out)) and len(training) > 590


def test_a_problem_is_a_function_of_its_index_alone():
    one = [question(gym("word_sorting").problem(index)) for index in range(5)]
    random.seed(5)
    assert [question(gym("word_sorting").problem(index)) for index in reversed(range(5))][::-1] == one
    assert [question(gym("word_sorting", seed=1).problem(index)) for index in range(5)] != one


def test_data_sets_that_draw_from_the_global_generator_are_seeded_too():
    random.seed(1)
    drawn = [question(gym("list_functions").problem(index)) for index in range(40)]
    after = random.random()
    random.seed(2)
    assert [question(gym("list_functions").problem(index)) for index in range(40)] == drawn
    random.seed(1)
    assert random.random() == after, "the draws moved the global generator"


def test_more_held_out_problems_than_there_are():
    with pytest.raises(ConfigError, match="distinct held-out problems, not 100"):
        gym("coin_flip", min_trials=3, max_trials=4).held_out(100)


def test_messages_and_longest_question():
    record = gym("chain_sum", instruction="Box it.", system="Be brief.").problem(0)
    assert [message["role"] for message in record.messages] == ["system", "user"]
    assert record.messages[1]["content"] == f"{question(record)}\n\nBox it."
    with pytest.raises(ConfigError, match=r"no training problem of at most task\.longest=5 characters"):
        gym("chain_sum", longest=5).problem(0)


@pytest.mark.parametrize("dataset", ["chain_sum", "countdown", "gsm_symbolic", "word_ladder", "graph_color"])
def test_a_record_travels_and_its_reference_answer_is_right(dataset):
    task = gym(dataset)
    record = pickle.loads(pickle.dumps(task.problem(0)))
    scored = task.score(record, f"I think so.\n<answer>{record.answer}</answer>")
    assert (scored.value, scored.correct) == ((1.0, True) if record.answer else (0.0, False))
    assert task.score(record, f"I think {record.answer}").reason == "no final answer"


def test_the_data_sets_own_scorer_gives_partial_marks():
    task = gym("chain_sum")
    record = task.problem(0)
    half = task.score(record, f"<answer>{record.answer} or so</answer>")
    assert 0 < half.value < 1 and half.correct is False


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("<answer>1</answer> no, <answer> 2\n</answer>", "2"),
        (r"<answer>1</answer> or \boxed{2}", "1"),
        (r"so \boxed{\frac{1}{2}}", r"\frac{1}{2}"),
        ("<answer>say <answer>3</answer>", "3"),
        ("<answer>4", None),
        ("4</answer>", None),
        ("", None),
    ],
)
def test_the_final_answer_is_the_last_complete_one(text, answer):
    assert final_answer(text) == answer


def test_the_last_line_may_stand_for_a_missing_tag():
    task = gym("chain_sum", untagged="last_line")
    record = task.problem(0)
    assert task.score(record, f"Let me see.\n{record.answer}\n").correct is True
    assert task.score(record, f"<answer>no</answer>\n{record.answer}").correct is False
    assert task.score(record, " \n").reason == "no final answer"
    with pytest.raises(ConfigError, match="task.untagged='first' must be wrong or last_line"):
        gym("chain_sum", untagged="first")


@pytest.mark.parametrize("dataset", sorted(PARSED_BY_SYMPY))
def test_no_answer_runs_code_where_sympy_parses_it(dataset, tmp_path, monkeypatch):
    """`sympy.parse_expr` is eval: without the screen, each of these makes the file."""
    monkeypatch.setenv("PYTHONHASHSEED", "0")
    task, target = gym(dataset), tmp_path / "made"
    record = task.problem(0)
    attacks = [
        f"open({str(target)!r}, 'w')",
        f"__import__('os').mkdir({str(target)!r})",
        "exit()",
        "S('1')",
        "x.y",
        "S(1)",
    ]
    for attack in attacks:
        scored = task.score(record, f"<answer>{attack}</answer>")
        assert scored.value == 0.0 and scored.reason.startswith("the answer "), scored
    assert not target.exists()
    assert task.score(record, "<answer>9**9**9**9</answer>").reason == "the answer has a tower of exponents"
    assert task.score(record, f"<answer>{record.answer}</answer>").correct is True


def test_an_exponent_that_would_be_written_out_is_not_read():
    """Fraction("1e999999999") has a thousand million digits."""
    task = gym("coin_flip")
    record = task.problem(0)
    for answer in ("1e999999999", "-1E-99999999", "1,000.5e+100000"):
        assert (
            task.score(record, f"<answer>{answer}</answer>").reason == "the answer has an exponent of over four digits"
        )
    assert task.score(record, "<answer>62.5e-3</answer>").correct is True


def test_scores_that_nobody_earned():
    task = gym("complex_arithmetic")
    assert task.score(task.problem(0), "<answer>nan</answer>").value == 0.0
    task = gym("coin_flip")
    record = task.problem(4)
    assert record.answer == "0.375" and task.score(record, "<answer>3/8</answer>").correct is True
    for answer in ("0", "0.0", "0.3", "1/" + "9" * 400):
        assert task.score(record, f"<answer>{answer}</answer>").value < 1, answer
    with pytest.raises(ConfigError, match="game_of_life_halting is refused: its scorer .* every answer full marks"):
        gym("game_of_life_halting")


def test_a_scorer_that_raises_on_an_answer_finds_it_wrong_but_not_where_it_raises_on_the_reference(monkeypatch):
    task = gym("chain_sum")
    record = task.problem(0)

    def raises(when):
        def score_answer(answer, entry):
            if when(answer):
                raise ValueError("malformed")
            return 1.0

        monkeypatch.setattr(task._data_set(0), "score_answer", score_answer, raising=True)

    raises(lambda answer: answer == "odd")
    assert task.score(record, "<answer>odd</answer>").reason == "scoring the answer raised ValueError"
    raises(lambda answer: True)
    with pytest.raises(ValueError, match="malformed"):
        task.score(record, "<answer>odd</answer>")


@pytest.mark.parametrize(
    ("dataset", "options", "words"),
    [
        ("chain_sun", {}, ["'chain_sun' is not known", "did you mean chain_sum?"]),
        ("chain_sum", {"max_term": 3}, ["task.options.max_term=3", "did you mean max_terms?"]),
        ("chain_sum", {"min_terms": 5, "max_terms": 2}, ["chain_sum refuses", "'min_terms': 5"]),
        ("chain_sum", {"size": 5}, ["task.options.size=5", "no such option"]),
        ("composite", {}, ["composite is refused"]),
    ],
)
def test_what_is_wrong_is_named(dataset, options, words):
    with pytest.raises(ConfigError) as error:
        gym(dataset, **options)
    assert all(word in str(error.value) for word in words), str(error.value)


def test_data_sets_that_depend_on_the_order_of_sets_need_a_fixed_hash_seed(monkeypatch):
    monkeypatch.delenv("PYTHONHASHSEED", raising=False)
    with pytest.raises(ConfigError, match="PYTHONHASHSEED=0"):
        gym("ransom_note").problem(0)


@pytest.mark.full
def test_with_a_fixed_hash_seed_two_processes_draw_the_same():
    program = (
        "from rltk.tasks.reasoning_gym import ReasoningGym, UNORDERED\n"
        "for name in UNORDERED:\n"
        "    task = ReasoningGym(512, 512, dataset=name)\n"
        "    print([task.problem(index).data['question'] for index in (0, 1)])"
    )
    environment = os.environ | {"PYTHONHASHSEED": "0"}
    runs = [
        subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, timeout=120)
        for _ in range(2)
    ]
    assert runs[0].stdout and runs[0].stdout == runs[1].stdout, runs[0].stderr
