"""DTSR on texts written by hand."""

from __future__ import annotations

import pickle

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rltk.rollout.dtsr import CLOSING, Dtsr, signal_start, sufficiency
from rltk.rollout.interventions import TurnView
from rltk.rollout.tools.options import DtsrOptions

PROBLEM = ({"role": "system", "content": "Be brief."}, {"role": "user", "content": "What is 6 * 7?"})
SIGNALS = DtsrOptions().signals


def view(text, sampled=64, fresh=0, prompt="<|user|>What is 6 * 7?<|assistant|>"):
    return TurnView(prompt, text, fresh, sampled, PROBLEM)


def dtsr(**options):
    return Dtsr(DtsrOptions(mode="eval", **options), ("\\boxed{", "<answer>"))


THINKING = "<think>6 * 7 is 42. Wait"


# -- where a signal stands -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "before",
    ["", "\n", "so 42.\n\n", "so 42. ", "so 42.", "is it? ", "42! ", "(it is 42.) ", 'he says "42." ', "**So.** ",
     "<think>", "<think>\n", "so $x = 42.$ ", "so 42…  ", "所以是42。", "42.\n\n**", '42. "'],
)  # fmt: skip
@pytest.mark.parametrize("signal", ["Wait", "Alternatively", "But wait", "Let me check"])
def test_a_signal_at_the_start_of_a_sentence(before, signal):
    assert signal_start(before + signal, 0, SIGNALS, "<think>") == len(before)
    assert signal_start(before + signal + ",", 0, SIGNALS, "<think>") == len(before)  # the token held more than it


@pytest.mark.parametrize("before", ["I ", "so, ", "42: ", "42; ", "3 - ", "`", "the word", "a)", "42 (", "think> "])
def test_no_signal_inside_a_sentence(before):
    assert signal_start(before + "Wait", 0, SIGNALS, "<think>") is None


@pytest.mark.parametrize("word", ["Waiting", "Waits", "Alternativelyx", "Wait4"])
def test_no_signal_inside_a_word(word):
    assert signal_start("So. " + word, 0, SIGNALS) is None


def test_only_what_was_sampled_last_is_looked_at():
    text = "So. Wait, 42. I wait"
    assert signal_start(text, 0, SIGNALS) == 4
    assert signal_start(text, 8, SIGNALS) is None
    assert signal_start("nothing of the kind", 0, SIGNALS) is None


def test_the_last_signal_counts_and_of_two_that_end_alike_the_longer():
    assert signal_start("So. Wait. But wait", 0, SIGNALS) == 10
    assert signal_start("So. No, Wait", 0, ["Wait", "No, Wait"]) == 4


# -- when the model is asked ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(("sampled", "asked"), [(63, False), (64, True), (65, True)])
def test_the_first_check_is_not_before_64_tokens(sampled, asked):
    assert (dtsr().at_stop(view(THINKING, sampled)) is not None) is asked


@pytest.mark.parametrize(("sampled", "asked"), [(163, False), (164, True)])
def test_a_check_is_64_tokens_after_the_last_one(sampled, asked):
    feature = dtsr()
    assert feature.at_stop(view(THINKING, 100))
    feature.answered("10")
    again = THINKING + ", is it? Wait"
    assert (feature.at_stop(view(again, sampled, len(THINKING))) is not None) is asked


def test_a_halt_that_asks_nothing_does_not_move_the_gap():
    feature = dtsr()
    assert feature.at_stop(view("<think>So I Wait", 90)) is None
    assert feature.at_stop(view("<think>So I Wait. Wait", 91, 16)) is not None


def test_checks_end_at_their_number():
    feature = dtsr(max_checks=2, gap_tokens=1)
    for sampled in (10, 20):
        assert feature.stops == tuple(SIGNALS)
        assert feature.at_stop(view(THINKING, sampled))
        assert feature.answered("50") is None
    assert feature.stops == ()
    assert feature.at_stop(view(THINKING, 30)) is None


@pytest.mark.parametrize(
    ("text", "prompt", "asked"),
    [
        ("<think>So. Wait", "p", True),
        ("So. Wait", "p<think>\n", True),  # the template opened the thought
        ("So. Wait", "p", False),
        ("<think>So.</think>\n\nWait", "p", False),
        ("So.</think>\n\nWait", "p<think>\n", False),
        ("<think>a</think>b<think>So. Wait", "p", True),
        ("So. Wait", "think between <think> and </think>", False),
        ("<think>So.\n```python\nx = 1\nWait", "p", False),  # in a call
        ("<think>So.\n```python\nx = 1\n```\n```output\n1\n```\nWait", "p", True),
        ("<think>So. <code>\nWait", "p", False),
        ("<think>So. <code>x</code>\nWait", "p", True),
    ],
)
def test_only_a_thought_is_checked(text, prompt, asked):
    assert (dtsr().at_stop(view(text, 64, 0, prompt)) is not None) is asked


@pytest.mark.parametrize(
    ("text", "asked"),
    [("So. Wait", True), ("It is \\boxed{42}. Wait", False), ("<answer>42</answer>\nWait", False)],
)
def test_without_marks_everything_is_thought_until_an_answer(text, asked):
    assert (dtsr(opens="").at_stop(view(text)) is not None) is asked


def test_the_question_holds_the_problem_and_the_thought_without_the_signal():
    question = dtsr(reply_tokens=9).at_stop(view("<think>It is {42}. Wait, no", 64))
    (message,) = question.messages
    assert message["role"] == "user" and question.max_tokens == 9
    assert "What is 6 * 7?" in message["content"] and "Be brief" not in message["content"]
    assert "\n\nIt is {42}.\n\n" in message["content"] and "Wait" not in message["content"]
    assert "student" in message["content"]  # in the third person


@pytest.mark.parametrize(
    ("opens", "prompt", "opening"),
    [
        ("<think>", "p", "<think>\n\n</think>\n\nSufficiency:"),
        ("<think>", "p<think>\n", "\n\n</think>\n\nSufficiency:"),
        ("", "p", "Sufficiency:"),
    ],
)
def test_the_reply_begins_behind_an_empty_thought(opens, prompt, opening):
    text = "So. Wait" if prompt != "p" or not opens else THINKING
    assert dtsr(opens=opens).at_stop(view(text, 64, 0, prompt)).opening == opening


# -- what the reply does -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("reply", "score"),
    [
        ("100", 100), (" 85", 85), (" 85.", 85), ("**85**", 85), ("\\boxed{100}", 100), ("85/100", 85),
        ("85 out of 100", 85), ("85%", 85), ("99.5", 99.5), ("0", 0), ("0-100: 85", 85),
        ("from 0 to 100, I say 85", 85), ("It is 100.", 100),
        ("100. The thought of 2 steps", 100), ("100\n\n90", 100), ("100/100", 100), ("0/100", 0),
        ("", None), ("sufficient", None), ("101", None), ("-5", None), ("between 40 and 60", None), ("0-100", None),
        ("step 3 is 90", None), ("1000", None), ("one hundred", None),
    ],
)  # fmt: skip
def test_a_reply_is_a_number_or_nothing(reply, score):
    assert sufficiency(reply) == score


@given(st.text(max_size=40))
def test_any_reply_is_read(reply):
    score = sufficiency(reply)
    assert score is None or 0 <= score <= 100


@given(st.integers(0, 100), st.sampled_from(["", " ", "\n", "**", "Score: "]), st.sampled_from(["", ".", "%", "/100"]))
def test_every_whole_number_is_read_back(number, before, after):
    assert sufficiency(f"{before}{number}{after}") == number


@pytest.mark.parametrize(
    ("reply", "threshold", "closes"),
    [
        ("100", 100, True),
        ("99", 100, False),
        ("99.9", 100, False),
        ("80", 80, True),
        ("79", 80, False),
        ("well", 0, False),
    ],
)
def test_the_thought_is_closed_at_the_threshold(reply, threshold, closes):
    feature = dtsr(threshold=threshold)
    feature.at_stop(view(THINKING, 70))
    assert feature.answered(reply) == ("\n</think>\n\n" if closes else None)
    assert feature.closed_at == (70 if closes else None)
    assert bool(feature.stops) is not closes


def test_a_thought_without_marks_is_closed_by_a_sentence():
    feature = dtsr(opens="")
    feature.at_stop(view("So. Wait", 70))
    assert feature.answered("100") == CLOSING


def test_notes_tell_checks_scores_failures_and_the_end():
    feature = dtsr(gap_tokens=1)
    for sampled, reply in ((10, "50"), (20, "no idea"), (30, "100")):
        assert feature.at_stop(view(THINKING, sampled))
        feature = pickle.loads(pickle.dumps(feature))  # a trajectory may be paused between question and reply
        feature.answered(reply)
    assert feature.notes() == {"dtsr": {"checks": 3, "parse_failures": 1, "closed_at": 30, "scores": [50, 100]}}


def test_dtsr_leaves_results_alone():
    assert dtsr().after_tools([]) is None
