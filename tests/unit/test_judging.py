"""What a verdict makes of the rule's record, and the figures that come of it."""

from __future__ import annotations

import asyncio
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from rltk.genrm_metrics import genrm_figures, unjudged
from rltk.learner.scored import advantage_by_verdict
from rltk.rewards.genrm.options import GenRMOptions
from rltk.rewards.genrm.types import Verdict
from rltk.rewards.judging import Judging
from rltk.trajectory import Record, RewardRecord, Segment, Trajectory

OPTIONS = GenRMOptions(name="test", deadline_s=7.0)
RIGHT, FLAWED_RIGHT = RewardRecord(1.0, correct=True, flawed=False), RewardRecord(1.0, correct=True, flawed=True)
UNCHECKED, WRONG = RewardRecord(1.0, correct=True), RewardRecord(0.0, correct=False)
UNKNOWN = RewardRecord(None, "nobody could tell", detail={"cause": "timeout"})
SOUND, FLAWED = Verdict(1.0, flawed=False, detail={"index": -1}), Verdict(0.0, flawed=True, detail={"index": 2})
LATE = Verdict(None, cause="timeout", detail={"reason": "no place was free"})


class Client:
    """Answers with the verdicts it was given, and keeps what it was asked."""

    def __init__(self, *verdicts: Verdict) -> None:
        self.verdicts, self.asked, self.limits = list(verdicts), [], []

    async def judge(self, questions, deadline_s=None):
        self.asked += questions
        self.limits.append(deadline_s)
        return [self.verdicts.pop(0) for _ in questions]


def trajectory(number: int = 0, reward: RewardRecord | None = None) -> Trajectory:
    prompt = Segment("prompt", np.array([1]))
    return Trajectory(f"u{number}", "p", "g", (prompt,), text=f"answer {number}", response="model's own", reward=reward)


PROBLEM = Record("p", ({"role": "system", "content": "s"}, {"role": "user", "content": "What is 1 + 1?"}), "2")


def judged(records, verdicts, options=OPTIONS, when="right", evaluation=False):
    client = Client(*verdicts)
    items = [(trajectory(number), PROBLEM) for number in range(len(records))]
    return asyncio.run(Judging(client, options, when)(items, records, evaluation)), client


def test_only_right_answers_are_asked_about_and_the_whole_text_is_shown():
    found, client = judged([WRONG, UNCHECKED, UNKNOWN, RIGHT], [FLAWED, SOUND])
    assert [question.uid for question in client.asked] == ["u1", "u3"] and client.limits == [7.0]
    asked = client.asked[0]
    assert (asked.problem, asked.response, asked.reference, asked.group) == ("What is 1 + 1?", "answer 1", "2", "g")
    assert found[0] is WRONG and found[2] is UNKNOWN
    assert (found[1].value, found[1].correct, found[1].flawed) == (1.0, True, True)
    assert found[3].flawed is False and found[3].detail["rule_flawed"] is False
    assert found[1].detail["genrm"]["index"] == 2


def test_in_training_the_judge_overrules_the_rules_label_and_in_an_evaluation_it_does_not():
    (found,), _ = judged([FLAWED_RIGHT], [SOUND])
    assert found.flawed is False and found.detail["rule_flawed"] is True
    (found,), _ = judged([FLAWED_RIGHT], [SOUND], evaluation=True)
    assert found.flawed is True and found.detail["genrm"]["flawed"] is False
    (found,), _ = judged([UNCHECKED], [FLAWED], evaluation=True)
    assert found.flawed is True  # the rule had none


@pytest.mark.parametrize(
    ("policy", "value", "flawed"), [("mask", None, None), ("not_flawed", 1.0, False), ("flawed", 1.0, True)]
)
def test_a_failure_is_never_a_reward(policy, value, flawed):
    options = replace(OPTIONS, on_failure=policy)
    (found,), _ = judged([UNCHECKED], [LATE], options)
    assert (found.value, found.flawed, found.correct) == (value, flawed, True)
    assert found.detail["genrm"]["cause"] == "timeout"
    if value is None:
        assert found.detail["cause"] == "genrm_timeout" and "no place was free" in found.reason
    (held_out,), _ = judged([UNCHECKED], [LATE], options, evaluation=True)
    assert held_out.value == 1.0 and held_out.flawed is None  # a failure of the judge is none of the policy


def test_where_the_rule_says_no_a_judge_may_say_yes_and_nothing_else():
    found, client = judged([RIGHT, WRONG, WRONG], [Verdict(1.0), Verdict(0.0)], when="wrong")
    assert [question.uid for question in client.asked] == ["u1", "u2"]
    assert found[0] is RIGHT
    assert (found[1].value, found[1].correct) == (1.0, True)
    assert (found[2].value, found[2].correct) == (0.0, False)


def test_a_judge_of_all_gives_the_reward():
    found, _ = judged([RIGHT, WRONG, UNKNOWN], [Verdict(0.25), Verdict(0.75)], when="all")
    assert [(r.value, r.correct) for r in found] == [(0.25, False), (0.75, True), (None, None)]


def test_what_a_judge_of_all_says_is_followed_with_a_label_and_in_evaluations_too():
    worst = Verdict(0.0, flawed=True), Verdict(1.0, flawed=False)  # as of an ensemble of fapo and answer_equivalence
    for evaluation in (False, True):
        found, _ = judged([FLAWED_RIGHT, WRONG], worst, when="all", evaluation=evaluation)
        assert [(r.value, r.correct, r.flawed) for r in found] == [(0.0, False, True), (1.0, True, False)]
    (found,), _ = judged([WRONG], [Verdict(1.0)], when="wrong", evaluation=True)
    assert (found.value, found.correct) == (1.0, True)


def test_evaluations_may_go_without_it():
    found, client = judged([RIGHT], [], replace(OPTIONS, evaluate=False), evaluation=True)
    assert found == [RIGHT] and client.asked == []


@given(st.lists(st.sampled_from([RIGHT, FLAWED_RIGHT, UNCHECKED, WRONG, UNKNOWN]), max_size=12), st.data())
def test_no_order_of_verdicts_gives_a_wrong_answer_a_reward(records, data):
    verdicts = [data.draw(st.sampled_from([SOUND, FLAWED, LATE])) for r in records if r.correct and r.value is not None]
    found, _ = judged(records, verdicts)
    for before, after in zip(records, found, strict=True):
        assert after.value in (before.value, None) and after.correct == before.correct


def test_figures_count_verdicts_and_measure_them_against_the_rule():
    records = [FLAWED_RIGHT, FLAWED_RIGHT, RIGHT, RIGHT, UNCHECKED, WRONG]
    found, _ = judged(records, [FLAWED, SOUND, FLAWED, SOUND, LATE], evaluation=True)
    figures = genrm_figures([trajectory(n, record) for n, record in enumerate(found)])
    assert figures["genrm/asked"] == pytest.approx(5 / 6)
    assert figures["genrm/unknown"] == figures["genrm/unknown/timeout"] == pytest.approx(1 / 5)
    assert figures["genrm/flawed"] == 0.5 and figures["genrm/rule_flawed"] == 0.5
    assert figures["genrm/precision"] == figures["genrm/recall"] == figures["genrm/f1"] == 0.5
    assert genrm_figures([trajectory(0, RIGHT)]) == {}


def test_what_counts_without_a_verdict_is_told():
    options = replace(OPTIONS, on_failure="flawed")
    found, _ = judged([UNCHECKED, RIGHT, WRONG], [LATE, SOUND], options)
    line = unjudged([trajectory(n, record) for n, record in enumerate(found)])
    assert line == "1 answers count without a verdict of the judge, first: timeout no place was free"
    masked, _ = judged([UNCHECKED], [LATE])
    assert unjudged([trajectory(0, masked[0])]) == ""  # left out, which is told as such


def test_a_verdict_that_nobody_gave_counts_against_recall():
    found, _ = judged([FLAWED_RIGHT, FLAWED_RIGHT], [LATE, FLAWED], evaluation=True)
    figures = genrm_figures([trajectory(n, record) for n, record in enumerate(found)])
    assert (figures["genrm/recall"], figures["genrm/precision"]) == (0.5, 1.0)


class Batch:
    """Of a RaggedBatch, what the figures read."""

    reward = np.array([1.0, 1.0, 1.0, 0.0, 0.0], np.float32)
    correct = np.array([1, 1, 1, 0, -1], np.int8)
    flawed = np.array([0, 1, -1, -1, -1], np.int8)


def test_mean_advantages_by_verdict_leave_out_what_is_not_learned_from():
    advantage = torch.tensor([1.0, 0.25, 0.5, -1.0, 9.0])
    found = advantage_by_verdict(Batch(), advantage, np.array([0, 1, 2, 3, 4]))
    means = {"advantage/sound": 0.75, "advantage/flawed": 0.25, "advantage/wrong": -1.0}
    assert found == means | {"advantage/flawed_positive": 1.0}
    assert advantage_by_verdict(Batch(), advantage, np.array([0, 4])) == {"advantage/sound": 1.0}
