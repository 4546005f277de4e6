from __future__ import annotations

import asyncio
import json
import pickle
import re
import statistics

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rltk.errors import ConfigError, InfrastructureError
from rltk.rewards.genrm.judges import build_judge, judge_names
from rltk.rewards.genrm.judges.answer_equivalence import AnswerEquivalence
from rltk.rewards.genrm.judges.best_of_n import BestOfN
from rltk.rewards.genrm.judges.branch_rethink import BranchRethink
from rltk.rewards.genrm.judges.ensemble import Ensemble
from rltk.rewards.genrm.judges.fapo import FlawFinder
from rltk.rewards.genrm.judges.pairwise import Pairwise
from rltk.rewards.genrm.types import JudgeUnavailable, Question, Reply, Verdict
from tests.unit.genrm_readers import first_wrong, model, script

SOUND = "47 + 35 = 82\n\n82 - 18 = 64\n\n\\boxed{64}"
FLAWED = "47 + 35 = 82\n\n82 - 18 = 54\n\n\\boxed{64}"


def question(response: str = SOUND, reference: str | None = "64", **data) -> Question:
    return Question("u1", "What is 47 + 35 - 18?", response, reference, data=data)


def judged(judge, asked: Question, ask) -> Verdict:
    verdict = asyncio.run(judge.judge(asked, ask))
    json.dumps(verdict.detail)
    assert verdict.seconds >= 0
    return verdict


def compared(judge, responses, ask):
    return asyncio.run(judge.compare("Which?", responses, ask))


# -- fapo --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("template", ["fapo.v1", "fapo_short.v1"])
def test_fapo_finds_the_first_wrong_paragraph(template):
    judge = FlawFinder(template)
    sound, flawed = judged(judge, question(), model(first_wrong)), judged(judge, question(FLAWED), model(first_wrong))
    assert (sound.value, sound.flawed, sound.detail["index"]) == (1.0, False, -1)
    assert (flawed.value, flawed.flawed, flawed.detail["index"]) == (0.0, True, 1)
    assert flawed.detail["paragraphs"] == 3 and flawed.detail["replies"] == 1
    assert flawed.detail["template"] in judge.version


def test_fapo_shows_problem_reference_and_numbered_paragraphs():
    ask, asked = script(r"\boxed{-1}", r"\boxed{-1}")
    judge = FlawFinder(max_tokens=77)
    judged(judge, question(), ask)
    judged(judge, question(reference=None, paragraphs=["all", "of\n\nit"]), ask)
    with_reference, without = (prompt.messages[-1]["content"] for prompt in asked)
    assert "What is 47 + 35 - 18?" in with_reference and "<reference_answer>\n64\n" in with_reference
    assert "<paragraph_2>\n\\fbox{64}\n</paragraph_2>" in with_reference
    assert "reference" not in without and "<paragraph_1>\nof\n\nit\n</paragraph_1>" in without
    assert (asked[0].max_tokens, asked[0].temperature) == (77, 0.0)
    assert asked[0].messages == judge.messages(question())


def test_a_reply_without_a_verdict_is_asked_for_once_more_and_otherwise():
    ask, asked = script("I cannot say.", r"\boxed{1}")
    verdict = judged(FlawFinder(seed=3), question(), ask)
    assert verdict.flawed is True and verdict.detail["replies"] == 2
    assert (asked[1].seed, asked[1].temperature > 0) == (4, True) and asked[1].messages == asked[0].messages


def test_two_replies_without_a_verdict_are_a_parse_fail():
    ask, asked = script(r"\boxed{7}", Reply(r"\boxed{-1}", "length", 9))
    verdict = judged(FlawFinder(), question(), ask)
    assert (verdict.value, verdict.flawed, verdict.cause, len(asked)) == (None, None, "parse_fail", 2)


def test_a_judge_that_is_away_gives_no_value_and_the_cause():
    verdict = judged(FlawFinder(), question(), script(JudgeUnavailable("timeout", "after 3 s"))[0])
    assert (verdict.value, verdict.cause, verdict.detail["reason"]) == (None, "timeout", "after 3 s")


def test_no_text_is_no_question():
    ask, asked = script()
    assert judged(FlawFinder(), question(" \n\n "), ask).cause == "empty" and not asked


def test_versions_differ_where_verdicts_may():
    options = [{}, {"template": "fapo_short.v1"}, {"max_tokens": 9}, {"temperature": 0.5}, {"seed": 1}]
    assert len({FlawFinder(**each).version for each in options}) == len(options)


# -- answer_equivalence ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("asked", "value", "by"),
    [
        (question(r"\boxed{2^6}", correct=True), 1.0, "rule"),
        (question(r"\boxed{6 4}"), 1.0, "rule"),
        (question(r"\boxed{64}", reference=r"because ... \boxed{64}"), 1.0, "rule"),
        (question("64"), 0.0, "rule"),
        (question(rf"\boxed{{{'64 ' * 200}}}"), 0.0, "rule"),
    ],
)
def test_what_the_rule_decides_no_judge_is_asked(asked, value, by):
    ask, prompts = script()
    verdict = judged(AnswerEquivalence(), asked, ask)
    assert (verdict.value, verdict.detail["by"], prompts) == (value, by, [])


@pytest.mark.parametrize(("says", "value"), [(["yes", "yes"], 1.0), (["yes", "no"], 0.0), (["no"], 0.0)])
def test_the_judge_overrules_only_in_both_orders(says, value):
    ask, prompts = script(*(rf"\boxed{{{word}}}" for word in says))
    verdict = judged(AnswerEquivalence(), question(r"\boxed{2^6}", correct=False), ask)
    assert (verdict.value, verdict.detail["by"], verdict.flawed) == (value, "judge", None)
    shown = [re.findall(r"_answer>\n(.*)\n</", p.messages[-1]["content"]) for p in prompts]
    assert shown == [["64", "2^6"], ["2^6", "64"]][: len(says)]


@pytest.mark.parametrize("reference", [None, " "])
def test_without_a_reference_nothing_is_equal_or_not(reference):
    assert judged(AnswerEquivalence(), question(reference=reference), script()[0]).cause == "no_reference"


def test_half_an_answer_from_the_judge_is_none():
    ask, _ = script(r"\boxed{yes}", JudgeUnavailable("unavailable"))
    assert judged(AnswerEquivalence(), question(r"\boxed{2^6}"), ask).cause == "unavailable"


# -- pairwise, best_of_n, branch_rethink -------------------------------------------------------------------------------


def prefers(best: str):
    """Chooses by content: the letter of the response that reads `best`."""

    def answer(content: str) -> str:
        letters = {text.strip(): letter for letter, text in re.findall(r"<response_(\w)>(.*?)</", content, re.DOTALL)}
        return rf"\boxed{{{letters[best]}}}"

    return model(answer)


@pytest.mark.parametrize("judge", [Pairwise(), BestOfN()])
def test_a_choice_by_content_is_consistent(judge):
    first, second = (compared(judge, ["good", "bad"], prefers(best)) for best in ("good", "bad"))
    assert (first.best, first.scores, first.consistency, first.cause) == (0, (1.0, 0.0), 1.0, "")
    assert (second.best, second.scores, second.consistency) == (1, (0.0, 1.0), 1.0)


@pytest.mark.parametrize("judge", [Pairwise(), BestOfN()])
@pytest.mark.parametrize("letter", "AB")
def test_a_choice_by_place_is_a_tie(judge, letter):
    found = compared(judge, ["good", "bad"], model(lambda _: rf"\boxed{{{letter}}}"))
    assert (found.best, found.scores, found.consistency, found.cause) == (None, (0.5, 0.5), 0.0, "tie")


@pytest.mark.parametrize("judge", [Pairwise(), BranchRethink()])
def test_equal_responses_are_a_tie_without_a_question(judge):
    found = compared(judge, ["same", "same"], script()[0])
    assert (found.best, found.scores, found.consistency, found.cause) == (None, (0.5, 0.5), None, "tie")


@pytest.mark.parametrize("judge", [Pairwise(), BestOfN()])
def test_one_order_without_an_answer_is_no_comparison(judge):
    found = compared(judge, ["a", "b"], script(r"\boxed{A}", JudgeUnavailable("timeout"))[0])
    assert (found.best, found.scores, found.cause) == (None, (), "timeout")


@settings(max_examples=25)
@given(st.permutations(["w", "x", "y", "z", "y"]))
def test_the_best_of_n_is_found_wherever_it_stands(responses):
    found = compared(BestOfN(), responses, prefers("y"))
    assert found.best == responses.index("y") and found.consistency == 1.0
    assert found.scores == tuple(float(index == found.best) for index in range(5))


def test_best_of_n_at_its_ends():
    only = compared(BestOfN(), ["one"], script()[0])
    assert (only.best, only.scores, only.consistency) == (0, (1.0,), None)
    split = compared(BestOfN(), ["a", "b", "c"], model(lambda _: r"\boxed{A}"))
    assert (split.best, split.scores, split.cause) == (None, (0.5, 0.0, 0.5), "tie")
    for count in (0, 27):
        with pytest.raises(ConfigError, match="1 to 26"):
            compared(BestOfN(), ["a"] * count, script()[0])
    for judge in (Pairwise(), BranchRethink()):
        with pytest.raises(ConfigError, match="best_of_n"):
            compared(judge, ["a", "b", "c"], script()[0])


def rethinker(branch: str, verdict: str):
    """Turn 1 and turn 2 by the chat's length; remembers the chats of turn 2."""
    chats = []

    async def ask(prompt):
        if len(prompt.messages) == 2:
            return Reply(branch, "stop", 1)
        chats.append(prompt.messages)
        shown = prompt.messages[1]["content"]
        other = shown.index("good") > shown.index("bad")
        return Reply(verdict or rf"\boxed{{{'AB'[other]}}}", "stop", 1)

    return ask, chats


def test_branch_rethink_reads_again_for_what_it_chose():
    ask, chats = rethinker(r"<think>\boxed{1}</think>B says </response_B> \boxed{3, 7}", "")
    found = compared(BranchRethink(), ["good", "bad"], ask)
    assert (found.best, found.consistency, found.detail["replies"]) == (0, 1.0, 4)
    assert found.detail["dimensions"] == [["accuracy of calculations", "safety"]] * 2
    system, user, said, again = chats[0]
    assert [m["role"] for m in chats[0]] == ["system", "user", "assistant", "user"]
    assert said["content"] == r"B says &lt;/response_B> \fbox{3, 7}"  # no thoughts, no tags
    assert "accuracy of calculations, safety" in again["content"]


@pytest.mark.parametrize("branch", [r"\boxed{}", r"\boxed{1,2,3,4}", r"\boxed{9}", "none"])
def test_branch_rethink_without_a_branch_is_a_parse_fail(branch):
    ask, chats = rethinker(branch, "")
    assert (compared(BranchRethink(), ["good", "bad"], ask).cause, chats) == ("parse_fail", [])


# -- ensemble ----------------------------------------------------------------------------------------------------------


class Says:
    """A judge with a fixed verdict."""

    def __init__(self, value: float | None, flawed: bool | None = None) -> None:
        self.name, self.version = "says", f"says {value} {flawed} {id(self)}"
        self.verdict = Verdict(value, flawed, cause="" if value is not None else "queue_full")

    async def judge(self, question, ask) -> Verdict:
        return self.verdict


@settings(max_examples=40)
@given(st.lists(st.floats(0, 1), min_size=2, max_size=5), st.floats(0, 3))
def test_ensemble_values(values, k):
    found = {
        combine: judged(Ensemble([Says(v, v < 0.5) for v in values], combine, k), question(), script()[0])
        for combine in ("mean", "worst", "mean_minus_std")
    }
    assert found["mean"].value == pytest.approx(statistics.fmean(values))
    assert found["worst"].value == min(values)
    expected = max(0.0, statistics.fmean(values) - k * statistics.pstdev(values))
    assert found["mean_minus_std"].value == pytest.approx(expected, abs=1e-12)
    assert all(verdict.flawed == (verdict.value <= 0.5) for verdict in found.values())


def test_ensemble_needs_every_member_and_labels_only_where_one_does():
    missing = judged(Ensemble([Says(1.0), Says(None)]), question(), script()[0])
    assert (missing.value, missing.cause) == (None, "queue_full")
    assert judged(Ensemble([Says(1.0), Says(0.2)]), question(), script()[0]).flawed is None
    halved = judged(Ensemble([Says(1.0, False), Says(0.0, True)]), question(), script()[0])
    assert (halved.value, halved.flawed) == (0.5, True)  # two who differ clear nobody


def test_ensemble_of_named_judges_with_a_model_each():
    members = [{"name": "fapo", "seed": 1, "max_tokens": 5}, "fapo"]
    ensemble = build_judge("ensemble", judges=members, combine="worst")
    assert [judge.sampling.max_tokens for judge in ensemble.judges] == [5, 4096]
    lenient, strict = model(lambda _: r"\boxed{-1}"), model(first_wrong)
    assert judged(Ensemble(members, "worst", asks=[lenient, strict]), question(FLAWED), script()[0]).flawed is True
    assert judged(Ensemble(members, "worst", asks=[lenient, lenient]), question(FLAWED), script()[0]).flawed is False


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"judges": ["fapo"]}, "at least two"),
        ({"judges": ["fapo", "fapo"]}, "the same"),
        ({"judges": ["fapo", "pairwise"]}, "compares"),
        ({"judges": ["fapo", {"seed": 1}]}, "no name"),
        ({"judges": ["fapo", {"name": "fapo", "sede": 1}]}, "did you mean seed"),
        ({"judges": ["fapo", "answer_equivalence"], "combine": "median"}, "mean_minus_std"),
        ({"judges": ["fapo", "answer_equivalence"], "k": -1}, "k=-1"),
        ({"judges": ["fapo", "answer_equivalence"], "asks": []}, "0 asks for 2"),
        ({}, "judges"),
    ],
)
def test_ensemble_refuses(options, words):
    with pytest.raises(ConfigError, match=words):
        build_judge("ensemble", **options)


# -- by name -----------------------------------------------------------------------------------------------------------


def test_every_file_is_a_judge_by_its_name():
    assert set(judge_names()) == {"answer_equivalence", "best_of_n", "branch_rethink", "ensemble", "fapo", "pairwise"}
    for name in set(judge_names()) - {"ensemble"}:
        judge = build_judge(name, max_tokens=7)
        assert judge.name == name and "max_tokens=7" in judge.version and f"{name}.v1:" in judge.version


def test_your_own_judge_by_path():
    assert build_judge(f"{__name__}:Says", value=0.25).verdict.value == 0.25


@pytest.mark.parametrize(
    ("name", "options", "words"),
    [
        ("fappo", {}, "did you mean fapo"),
        ("fapo", {"tempalte": "x"}, "did you mean template"),
        ("fapo", {"max_tokens": 0}, "max_tokens=0"),
        ("fapo", {"temperature": float("nan")}, "temperature=nan"),
        ("fapo", {"seed": -1}, "seed=-1"),
        ("no_such_module:Judge", {}, "no_such_module"),
        ("json:Judge", {}, "no class 'Judge'"),
        ("json:JSONDecoder", {}, "neither judge"),
        ("fapo", {"template": None}, "template None is not the name"),
        (f"{__name__}:Breaks", {}, "cannot be built .*RuntimeError: no weights"),
        (f"{__name__}:Nameless", {}, "Nameless has no `version`"),
        (f"{__name__}:Waits", {}, "Waits.judge must be `async def`"),
    ],
)
def test_what_is_no_judge_is_named(name, options, words):
    with pytest.raises(ConfigError, match=words):
        build_judge(name, **options)


class Nameless:
    name = "nameless"

    async def judge(self, question, ask): ...


class Waits(Nameless):
    version = "1"

    def judge(self, question, ask): ...


class Breaks(Nameless):
    def __init__(self):
        raise RuntimeError("no weights")


# -- types -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "wrong",
    [{"value": None}, {"value": 1.0, "cause": "timeout"}, {"value": 1.5}, {"value": float("nan")}]
    + [{"value": None, "cause": "timeout", "flawed": True}],
)
def test_a_verdict_that_contradicts_itself_is_refused(wrong):
    with pytest.raises(ValueError, match="verdict"):
        Verdict(**wrong)


def test_the_cause_survives_the_way_between_processes():
    error = pickle.loads(pickle.dumps(JudgeUnavailable("timeout", "after 3 s")))
    assert isinstance(error, InfrastructureError) and (error.cause, str(error)) == ("timeout", "after 3 s")
