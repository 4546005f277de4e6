"""ATTC on log-probs written by hand."""

from __future__ import annotations

import math
import pickle

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rltk.rollout.attc import RECONSIDER, TIMED_OUT, TRUST, Attc, confidence
from rltk.rollout.interventions import CallSpan, build_interventions
from rltk.rollout.tools.options import AttcOptions, DtsrOptions
from rltk.rollout.tools.types import STATUSES, ToolCall, ToolResult

FAILED = [status for status in STATUSES if status not in ("ok", "timeout", "infra_error")]


def called(probabilities, status="ok"):
    """A call whose tokens had these probabilities; None: unscorable."""
    logprobs = None if probabilities is None else np.log(np.array(probabilities, np.float64)).astype(np.float32)
    return CallSpan(ToolCall("python"), logprobs), ToolResult(status, "42")


def attc(**options):
    return Attc(AttcOptions(mode="eval", **options))


def test_confidence_is_the_geometric_mean_of_the_probabilities():
    assert confidence(np.log([0.5, 0.125]).astype(np.float32)) == pytest.approx(0.25, rel=1e-6)
    assert confidence(np.zeros(3, np.float32)) == 1.0
    assert confidence(np.full(7, 5e-5, np.float32)) == 1.0  # rounding put them above 0


@pytest.mark.parametrize("nothing", [None, np.zeros(0, np.float32)])
def test_without_tokens_there_is_no_confidence(nothing):
    assert confidence(nothing) is None


@given(st.lists(st.floats(-50, 0, width=32), min_size=1, max_size=50))
def test_confidence_lies_between_the_least_and_the_largest_probability(logprobs):
    value = confidence(np.array(logprobs, np.float32))
    assert math.exp(min(logprobs)) * (1 - 1e-9) <= value <= math.exp(max(logprobs)) * (1 + 1e-9)


def test_a_long_call_does_not_lose_precision():
    """10 000 tokens just over the threshold: a float32 sum would lose the difference."""
    logprobs = np.full(10_000, np.float32(math.log(0.9700001)), np.float32)
    assert confidence(logprobs) == pytest.approx(math.exp(float(logprobs[0])), abs=1e-12)


def test_the_threshold_itself_is_trusted():
    span, result = called([0.9, 0.8, 0.95])
    edge = confidence(span.logprobs)
    assert attc(threshold=edge).after_tools([(span, result)]) == TRUST
    assert attc(threshold=np.nextafter(edge, 2.0)).after_tools([(span, result)]) == RECONSIDER


def test_at_the_papers_threshold():
    assert attc().after_tools([called([0.98, 0.99])]) == TRUST
    assert attc().after_tools([called([0.96, 0.97])]) == RECONSIDER
    assert attc().after_tools([called([1.0] * 99 + [0.04])]) == RECONSIDER  # .9683: one token in a hundred is enough


@pytest.mark.parametrize("probabilities", [[1.0], [0.1], None])
def test_a_time_out_has_its_own_sentence(probabilities):
    assert attc().after_tools([called(probabilities, "timeout")]) == TIMED_OUT
    assert attc(reconsider_errors=False).after_tools([called(probabilities, "timeout")]) == TIMED_OUT


@pytest.mark.parametrize("status", FAILED)
def test_a_failed_call_is_reconsidered_however_sure(status):
    assert attc().after_tools([called([1.0], status)]) == RECONSIDER
    assert attc().after_tools([called(None, status)]) == RECONSIDER


def test_failures_are_judged_by_confidence_where_so_asked():
    option = {"reconsider_errors": False}
    assert attc(**option).after_tools([called([1.0], "error")]) == TRUST
    assert attc(**option).after_tools([called([0.5], "error")]) == RECONSIDER
    assert attc(**option).after_tools([called(None, "error")]) is None


@pytest.mark.parametrize("status", ["parse_error", "unknown_tool"])
def test_what_was_never_run_is_never_trusted(status):
    assert attc(reconsider_errors=False).after_tools([called([1.0], status)]) == RECONSIDER


def test_an_unscorable_call_is_met_with_silence_and_counted():
    feature = attc()
    assert feature.after_tools([called(None)]) is None
    assert feature.notes() == {
        "attc": {"confidence": [], "unscorable": 1, "trusted": 0, "reconsidered": 0, "timed_out": 0, "silent": 1}
    }


def test_the_least_sure_of_several_calls_decides():
    sure, unsure = called([0.99]), called([0.5])
    assert attc().after_tools([sure, sure]) == TRUST
    assert attc().after_tools([sure, unsure]) == RECONSIDER
    assert attc().after_tools([sure, called(None)]) is None
    assert attc().after_tools([sure, called([0.99], "error")]) == RECONSIDER
    assert attc().after_tools([called([0.99], "error"), called([0.99], "timeout")]) == TIMED_OUT


def test_notes_count_turns_and_keep_every_confidence():
    feature = attc()
    for calls in (
        [called([1.0])],
        [called([0.5]), called(None)],
        [called([0.25], "error")],
        [called([1.0], "timeout")],
    ):
        feature.after_tools(calls)
    notes = pickle.loads(pickle.dumps(feature)).notes()["attc"]
    assert notes.pop("confidence") == pytest.approx([1.0, 0.5, 0.25, 1.0])
    assert notes == {"unscorable": 1, "trusted": 1, "reconsidered": 1, "timed_out": 1, "silent": 1}


def test_attc_never_halts_the_sampling():
    assert attc().stops == ()


@pytest.mark.parametrize(
    ("mode", "evaluation", "acts"),
    [
        ("off", True, 0),
        ("off", False, 0),
        ("eval", True, 2),
        ("eval", False, 0),
        ("rollout", True, 2),
        ("rollout", False, 2),
    ],
)
def test_a_mode_says_where_it_acts(mode, evaluation, acts):
    built = build_interventions(AttcOptions(mode=mode), DtsrOptions(mode=mode), evaluation, ["\\boxed{"])
    assert [type(one).__name__ for one in built] == ["Attc", "Dtsr"][:acts]


def test_two_trajectories_share_nothing():
    first, second = (build_interventions(AttcOptions(mode="rollout"), DtsrOptions(), False)[0] for _ in range(2))
    first.after_tools([called([1.0])])
    assert second.notes()["attc"]["trusted"] == 0
