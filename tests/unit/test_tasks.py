import pickle
import random
import re
import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rltk.config import Task as TaskConfig
from rltk.errors import ConfigError
from rltk.tasks import build_task
from rltk.tasks.arithmetic import Arithmetic
from rltk.tasks.arithmetic_long import ArithmeticLong
from rltk.tasks.arithmetic_tool import ArithmeticTool
from rltk.tasks.demonstrations import STYLES, demonstrate
from rltk.tasks.generated import is_held_out
from rltk.tasks.paragraphs import score_paragraphs

ARITHMETIC = Arithmetic(64, 64)
LONG = ArithmeticLong(64, 512)
TOOL = ArithmeticTool(64, 128)
TASKS = [ARITHMETIC, LONG, TOOL]
STEPS = ["47 + 35 = 82", "82 - 18 = 64"]


def question(record):
    return record.messages[-1]["content"]


def solution(*paragraphs):
    return "\n\n".join(paragraphs)


@pytest.mark.parametrize("task", TASKS, ids=lambda t: t.name)
def test_training_and_held_out_problems_are_disjoint_whatever_draws_them(task):
    rng = random.Random(3)
    held_out = {question(r) for r in task.held_out(300)}
    drawn = {question(task.problem(i)) for i in range(300)} | {question(task.sample(rng, 3)) for _ in range(300)}
    assert len(held_out) == 300 and all(map(is_held_out, held_out))
    assert not any(map(is_held_out, drawn))


def test_held_out_share_is_about_a_tenth():
    rng = random.Random(0)
    share = sum(is_held_out(question(ARITHMETIC.draw(rng, 3))) for _ in range(5000)) / 5000
    assert 0.08 < share < 0.12


@pytest.mark.parametrize("task", TASKS, ids=lambda t: t.name)
def test_problems_are_a_pure_function_of_options_and_index(task):
    again = type(task)(64, 512)
    assert [task.problem(i) for i in (5, 0, 5)] == [again.problem(i) for i in (5, 0, 5)]
    assert again.held_out(7) == task.held_out(20)[:7]
    other = type(task)(64, 512, seed=1)
    assert other.problem(0) != task.problem(0) and other.held_out(5) == task.held_out(5)
    assert len({task.problem(i).id for i in range(50)}) == 50


def test_held_out_problems_take_the_levels_in_turn():
    assert [r.level for r in ARITHMETIC.held_out(7)] == ["1", "2", "3", "4", "5", "1", "2"]


@given(st.integers(0, 10**6), st.sampled_from([1, 2, 3, 4, 5]))
def test_an_arithmetic_problem_means_what_it_says(seed, level):
    record = ARITHMETIC.draw(random.Random(seed), level)
    expression = re.fullmatch(r"What is (.*)\?", question(record)).group(1)
    assert int(record.answer) == eval(expression) >= 0
    assert len(record.data["steps"]) == min(level, 4)
    assert level <= 3 or (int(expression.split()[0]) >= 100) == (level == 5)
    for step in record.data["steps"]:
        left, right = step.split(" = ")
        assert eval(left) == int(right)


@given(st.integers(0, 10**6), st.integers(1, 6), st.integers(3, 12))
def test_a_problem_for_a_tool_has_a_large_product_and_a_positive_answer(seed, level, digits):
    record = ArithmeticTool(64, 128, digits=digits).draw(random.Random(seed), level)
    expression = record.data["expression"]
    assert question(record) == f"What is {expression}?"
    assert int(record.answer) == eval(expression) > 0
    numbers, operators = expression.split()[::2], expression.split()[1::2]
    assert {len(number) for number in numbers} == {digits} and len(operators) == level
    assert operators[0] == "*" and set(operators[1:]) <= set("+-")


def test_a_problem_for_a_tool_is_scored_by_its_last_box():
    record = TOOL.problem(0)
    assert TOOL.score(record, rf"\boxed{{1}} no: \boxed{{{record.answer}}}").value == 1.0
    assert TOOL.score(record, rf"\boxed{{{record.answer}}} no: \boxed{{1}}").value == 0.0
    assert TOOL.score(record, f"It is {record.answer}.").reason == "no boxed answer"
    assert TOOL.score(record, rf"\boxed{{{record.answer}}}").flawed is None


@pytest.mark.parametrize("options", [{"digits": 2}, {"digits": 13}, {"levels": [7]}])
def test_a_problem_for_a_tool_has_its_limits(options):
    with pytest.raises(ConfigError, match=next(iter(options))):
        ArithmeticTool(64, 128, **options)


@given(st.integers(0, 10**6), st.integers(1, 4))
def test_products_come_first_so_that_left_to_right_is_the_usual_precedence(seed, level):
    record = Arithmetic(64, 64, operators="*+-", digits=5).draw(random.Random(seed), level)
    assert int(record.answer) == eval(question(record).removeprefix("What is ").rstrip("?"))


@given(st.integers(0, 10**6), st.sampled_from(LONG.levels))
def test_a_long_answer_combines_an_early_result_with_the_last(seed, level):
    record = LONG.draw(random.Random(seed), level)
    steps, early = record.data["steps"], record.data["early"]
    results = [int(s.rpartition(" ")[2]) for s in steps[:level]]
    assert len(steps) == level + 2 and steps[level] == steps[early - 1] and early <= 9
    assert int(record.answer) == results[early - 1] + results[-1]


@pytest.mark.parametrize("task", [ARITHMETIC, LONG], ids=lambda t: t.name)
@pytest.mark.parametrize("style", STYLES)
def test_each_style_scores_as_it_is_meant_to(task, style):
    rng = random.Random(style)
    for level in task.levels:
        for _ in range(20):
            record = task.sample(rng, level)
            scored = task.score(record, demonstrate(record, style, rng, right=1.0))
            assert scored.value == float(scored.correct) == float(style != "slip")
            assert scored.flawed is (None if style == "slip" else style != "sound")
            assert ("first_flawed" in scored.detail) == (style != "sound")


def test_a_guess_that_misses_is_wrong():
    rng = random.Random(0)
    for index in range(50):
        record = ARITHMETIC.problem(index)
        assert ARITHMETIC.score(record, demonstrate(record, "guess", rng, right=0.0)).value == 0.0


@pytest.mark.parametrize(
    ("text", "value", "flawed", "first"),
    [
        (solution("47 + 35 = 82", "82 - 18 = 64", r"\boxed{64}"), 1.0, False, None),
        (solution("47+35=82", " 82 -  18 = 64", r"\boxed{ 64 }") + "\n", 1.0, False, None),
        (solution("47 + 35 = 83", "82 - 18 = 64", r"\boxed{64}"), 1.0, True, 0),
        (solution("47 + 35 = 82", r"\boxed{64}"), 1.0, True, 1),
        (r"\boxed{64}", 1.0, True, 0),
        (solution("47 + 35 = 82", "82 - 18 = 64", r"\boxed{64}", "indeed"), 1.0, True, 3),
        (solution("47 + 35 = 82", "82 - 18 = 65", r"\boxed{65}"), 0.0, None, 1),
        (solution("47 + 35 = 82", "82 - 18 = 64"), 0.0, None, None),
        (r"\boxed{64.0}", 0.0, None, None),
        (r"\boxed{64} \boxed{65}", 0.0, None, 0),
        (rf"\boxed{{{'9' * 5000}}}", 0.0, None, None),
        ("", 0.0, None, None),
    ],
)
def test_paragraph_scores(text, value, flawed, first):
    scored = score_paragraphs(STEPS, "64", text)
    assert (scored.value, scored.flawed, scored.detail.get("first_flawed")) == (value, flawed, first)


@given(st.text())
def test_any_text_gets_a_score(text):
    assert score_paragraphs(STEPS, "64", text).value == 0.0 or "64" in text


def test_steps_are_not_checked_where_a_tool_may_do_them():
    record = ARITHMETIC.problem(0)
    scored = Arithmetic(64, 64, check_steps=False).score(record, rf"\boxed{{{record.answer}}}")
    assert scored.value == 1.0 and scored.flawed is None


def test_build_task_passes_options_and_tasks_pickle():
    task = build_task(TaskConfig(options={"levels": [2], "seed": 4}))
    assert task.problem(0).level == "2"
    assert pickle.loads(pickle.dumps(task)).problem(0) == task.problem(0)


@pytest.mark.parametrize(
    ("config", "words"),
    [
        (TaskConfig(options={"level": [1]}), ["task.level", "'levels'"]),
        (TaskConfig(target="rltk.tasks.arithmetic:Arithmetc"), ["Arithmetc", "'Arithmetic'"]),
        (TaskConfig(target="no_such_module:Task"), ["no_such_module"]),
        (TaskConfig(target="rltk.tasks.arithmetic"), ["module:Class"]),
        (TaskConfig(target="rltk.tasks.jsonl:Jsonl"), ["task.path"]),
        (TaskConfig(options={"levels": []}), ["task.levels"]),
        (TaskConfig(options={"levels": [7]}), ["task.levels", "5"]),
        (TaskConfig(options={"operators": "/"}), ["task.operators", "/"]),
    ],
)
def test_bad_options_are_refused_by_name(config, words):
    with pytest.raises(ConfigError) as error:
        build_task(config)
    assert all(word in str(error.value) for word in words), str(error.value)


def test_a_task_with_too_few_held_out_problems_says_so():
    with pytest.raises(ConfigError, match="held-out"):
        Arithmetic(64, 64, levels=[1], digits=1).held_out(10_000)


def test_tasks_load_without_torch_ray_or_vllm():
    code = "import sys, rltk.tasks.arithmetic, rltk.tasks.jsonl; print({'torch', 'ray', 'vllm'} & set(sys.modules))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "set()"
