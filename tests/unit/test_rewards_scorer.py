import asyncio
import math
import pickle
from dataclasses import replace

import numpy as np
import pytest

from rltk.errors import ConfigError
from rltk.rewards.scorer import ScorerSpec, as_record, check_scorer, load_scorer, timed_out
from rltk.trajectory import Record, RewardRecord, Segment, ToolUse, Trajectory

RECORD = Record("p", ({"role": "user", "content": "1 + 1"},), "2")
TRAJECTORY = Trajectory("t", "p", "g", (Segment("prompt", np.arange(2)),), text="the answer is 2")

USER_MODULE = """
import json

from rltk.trajectory import RewardRecord


def score(trajectory, record, bonus=0.0):
    return float(record.answer in trajectory.text) + bonus


async def score_async(trajectory, record):
    return float(record.answer in trajectory.text)


async def fails_async(trajectory, record):
    raise KeyError("judge")


def fails(trajectory, record):
    return json.loads("not json")  # line 20: the user's, though json raises


def leaves(trajectory, record):
    raise SystemExit(3)


def needs_three(trajectory, record, third):
    return 1.0


class Judge:
    def __init__(self, limit=1):
        self.limit = limit

    def __call__(self, trajectory, record):
        return self.limit


class Looks:
    def score(self, record, text):
        raise AssertionError("it wants the trajectory")

    def score_trajectory(self, record, trajectory):
        return float(len(trajectory.calls))


class Rule:
    def __init__(self, right=1.0):
        self.right = right
        self.warm = False

    def warm_up(self):
        self.warm = True

    def score(self, record, text):
        assert self.warm
        return RewardRecord(self.right if record.answer in text else 0.0, correct=True, flawed=True)


class NotARule:
    pass


number = 3
"""


@pytest.fixture(autouse=True)
def user_module(tmp_path, monkeypatch):
    (tmp_path / "user_rewards.py").write_text(USER_MODULE)
    (tmp_path / "broken_rewards.py").write_text("def score(:\n")
    (tmp_path / "needy_rewards.py").write_text("import package_that_is_nowhere\n")
    monkeypatch.syspath_prepend(str(tmp_path))


def score(target, **keywords):
    keywords = {"kind": "function"} | keywords
    return load_scorer(ScorerSpec(f"user_rewards:{target}", **keywords))(TRAJECTORY, RECORD)


def test_a_function_its_options_and_its_verdict():
    assert score("score") == RewardRecord(1.0, reason="scored", correct=True)
    assert score("score", options={"bonus": -0.5}).correct is False


def test_an_async_function():
    scorer = load_scorer(ScorerSpec("user_rewards:score_async", kind="function"))
    assert asyncio.run(scorer(TRAJECTORY, RECORD)).value == 1.0
    failed = asyncio.run(load_scorer(ScorerSpec("user_rewards:fails_async", kind="function"))(TRAJECTORY, RECORD))
    assert failed.value is None and failed.reason.startswith("KeyError: 'judge' (")


def test_a_class_is_built_with_its_options():
    assert score("Judge", options={"limit": 3}).value == 3.0


def test_a_task_scores_by_its_rule():
    record = score("Rule", kind="task", options={"right": 2.0})
    assert (record.value, record.correct, record.flawed) == (2.0, True, True)


def test_an_answer_that_a_tool_printed_is_not_the_models():
    rule = load_scorer(ScorerSpec("user_rewards:Rule"))
    printed = replace(TRAJECTORY, text="print(1 + 1)\n2\nI do not know", response="print(1 + 1)\nI do not know")
    assert rule(printed, RECORD).value == 0.0
    said = replace(printed, response="print(1 + 1)\nit is 2", calls=(ToolUse(0, "python", "ok"),))
    assert rule(said, RECORD).value == 1.0
    assert load_scorer(ScorerSpec("user_rewards:Looks"))(said, RECORD).value == 1.0  # the number of its calls


def test_an_exception_masks_and_names_its_line():
    record = score("fails")
    assert record.value is None and record.detail == {"cause": "exception"}
    assert record.reason.startswith("JSONDecodeError: Expecting value") and "user_rewards.py:20)" in record.reason
    assert score("leaves").reason.startswith("SystemExit: 3 (")


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (math.nan, "returned nan"),
        (-math.inf, "returned -inf"),
        (np.float32("inf"), "returned inf"),
        ("1", "returned str '1'"),
        ([1.0], "returned list"),
        (1j, "returned complex"),
        (RewardRecord(math.nan), "RewardRecord with the value float nan"),
        (RewardRecord("1"), "RewardRecord with the value str '1'"),
        (None, "returned None"),
    ],
)
def test_what_is_not_a_number_masks(value, text):
    record = as_record(value)
    assert record.value is None and text in record.reason and record.detail["cause"] in ("not_a_number", "scorer")


@pytest.mark.parametrize(
    "value", [1, True, 1.0, np.float32(1), np.array(1.0), np.bool_(True), RewardRecord(np.float64(1))]
)
def test_numbers_become_plain_floats(value):
    record = as_record(value)
    assert record.value == 1.0 and type(record.value) is float


def test_time_outs_count_as_the_spec_says():
    assert timed_out(ScorerSpec("m:a"), 10).value is None
    wrong = timed_out(ScorerSpec("m:a", on_timeout="wrong"), 10)
    assert (wrong.value, wrong.correct, wrong.reason) == (0.0, False, "timeout after 10 s")


@pytest.mark.parametrize(
    ("target", "options", "kind", "words"),
    [
        ("user_rewards", {}, "function", ["'user_rewards'", "module:attribute"]),
        ("user_reward:score", {}, "function", ["no module 'user_reward'", "nearest: user_rewards"]),
        ("rltk.rewards.scorers:score", {}, "function", ["'rltk.rewards.scorers'", "nearest: scorer"]),
        ("user_rewards:scor", {}, "function", ["no attribute 'scor'", "nearest: score"]),
        ("user_rewards:number", {}, "function", ["is a int, not a function"]),
        ("user_rewards:score", {"bonuss": 1}, "function", ["no option 'bonuss'", "nearest: bonus"]),
        ("user_rewards:needs_three", {}, "function", ["needs_three(trajectory, record, third)", "'third'"]),
        ("user_rewards:Judge", {"limits": 1}, "function", ["no option 'limits'", "nearest: limit"]),
        ("user_rewards:NotARule", {}, "task", ["no method score(record, text)"]),
        ("user_rewards:NotARule", {}, "function", ["cannot be called", "__call__"]),
        ("user_rewards:score", {}, "task", ["a task is a class"]),
        ("broken_rewards:score", {}, "function", ["SyntaxError", "broken_rewards.py:1"]),
        ("needy_rewards:score", {}, "function", ["imports 'package_that_is_nowhere'"]),
    ],
)
def test_mistakes_are_named_before_the_run(target, options, kind, words):
    with pytest.raises(ConfigError) as error:
        check_scorer(ScorerSpec(target, options, kind))
    for word in words:
        assert word in str(error.value)


def test_a_spec_travels():
    spec = ScorerSpec("user_rewards:score", {"bonus": 1.0}, "function", "wrong", 4)
    assert pickle.loads(pickle.dumps(spec)) == spec
