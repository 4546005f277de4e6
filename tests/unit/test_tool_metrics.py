"""Figures of tools, ATTC and DTSR, from trajectories written by hand."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rltk.errors import MismatchError
from rltk.evaluate import _tool_lines
from rltk.evaluation import evaluate
from rltk.rollout.worker import Job, RolloutResult, Sampling
from rltk.tool_metrics import holds_answer, tool_figures
from rltk.trajectory import Record, RewardRecord, Segment, ToolUse
from tests.unit.samples import sampled

RECORD = Record("six", ({"role": "user", "content": "6 * 7"},), "42")


def trajectory(*calls, correct=None, notes=None, extra=(), tokens=2):
    """`calls`: (status, output) or ToolUse."""
    made = sampled(Job("six/0", "six", RECORD, 0), 1.0, correct, tokens)
    uses = tuple(
        call if isinstance(call, ToolUse) else ToolUse(0, "python", *call[:1], "", *call[1:]) for call in calls
    )
    return replace(made, calls=uses, notes=notes or {}, segments=(*made.segments, *extra))


def attc(confidence, unscorable=0, trusted=0, reconsidered=0, timed_out=0, silent=0):
    met = {"trusted": trusted, "reconsidered": reconsidered, "timed_out": timed_out, "silent": silent}
    return {"attc": {"confidence": confidence, "unscorable": unscorable, **met}}


def dtsr(checks, parse_failures, closed_at, *scores):
    counts = {"checks": checks, "parse_failures": parse_failures, "closed_at": closed_at}
    control = {"asked_tokens": 5 * checks, "not_asked": 1, "left_out": 0}
    return {"dtsr": {**counts, "scores": list(scores)}, "control": control}


def test_a_run_without_tools_has_no_figures():
    assert tool_figures([trajectory(), trajectory()], [RECORD] * 2) == {}
    assert tool_figures([]) == {}


def test_use_calls_and_tokens():
    extra = (Segment("tool", [1, 2, 3]), Segment("control", [4]))
    rows = [
        trajectory(("ok", "1"), ("error", "2"), extra=extra, notes={"turns": {"void": 2, "cut": 1}}),
        trajectory(notes={"turns": {"void": 0, "cut": 0}}),
        trajectory(("ok", "3"), notes={"turns": {"void": 1, "cut": 0}}),
        trajectory(notes={"turns": {"void": 1, "cut": 0}}),
    ]
    figures = tool_figures(rows)
    assert (figures["tools/used"], figures["tools/calls"]) == (0.5, 0.75)
    assert (figures["tools/tokens"], figures["control/tokens"]) == (0.75, 0.25)
    assert (figures["tools/void_turns"], figures["tools/truncated"]) == (1.0, 0.25)
    assert all(type(value) is float for value in figures.values())


def test_a_run_with_tools_that_nobody_used_says_so():
    figures = tool_figures([trajectory(notes={"turns": {"void": 1, "cut": 0}})])
    assert figures["tools/used"] == figures["tools/calls"] == 0.0 and figures["tools/void_turns"] == 1.0
    assert not any(name.startswith("tools/status/") for name in figures)


def test_statuses_are_shares_of_calls():
    figures = tool_figures([trajectory(("ok", ""), ("timeout", ""), ("ok", "")), trajectory(("parse_error", ""))])
    statuses = {name: value for name, value in figures.items() if name.startswith("tools/status/")}
    assert statuses["tools/status/ok"] == 0.5 and statuses["tools/status/timeout"] == 0.25
    assert statuses["tools/status/oom"] == 0.0 and sum(statuses.values()) == 1.0
    assert "tools/status/infra_error" not in statuses


def test_seconds_are_means_and_95th_percentiles():
    calls = [ToolUse(0, "python", "ok", queue_s=float(i), run_s=2.0 * i, cpu_s=1.0) for i in range(21)]
    figures = tool_figures([trajectory(*calls)])
    assert (figures["tools/queue_s"], figures["tools/queue_s_p95"]) == (10.0, 19.0)
    assert (figures["tools/run_s"], figures["tools/run_s_p95"]) == (20.0, 38.0)
    assert (figures["tools/cpu_s"], figures["tools/cpu_s_p95"]) == (1.0, 1.0)


# -- the result that was ignored -------------------------------------------------------------------------------------


def test_ignored_is_of_wrong_answers_with_a_call_by_their_last_result():
    rows = [
        trajectory(("ok", "42\n"), correct=False),  # ignored
        trajectory(("ok", "42\n"), ("ok", "41\n"), correct=False),  # the last result was wrong too
        trajectory(("ok", "42\n"), correct=True),
        trajectory(("ok", "42\n"), correct=None),  # nobody can tell
        trajectory(correct=False),  # no tool
    ]
    assert tool_figures(rows, [RECORD] * 5)["tools/ignored"] == 0.5
    assert "tools/ignored" not in tool_figures(rows[2:], [RECORD] * 3)
    assert "tools/ignored" not in tool_figures(rows)


def test_a_record_without_an_answer_tells_nothing():
    rows = [trajectory(("ok", ""), correct=False)]
    assert "tools/ignored" not in tool_figures(rows, [replace(RECORD, answer="")])


def test_records_are_each_trajectorys():
    with pytest.raises(MismatchError, match="1 records for 2 trajectories"):
        tool_figures([trajectory(), trajectory()], [RECORD])


@pytest.mark.parametrize(
    ("output", "answer", "held"),
    [
        ("42\n", "42", True), ("x = 42.", "42", True), ("42.0", "42", True), ("4.2e1", "42", True),
        ("-42", "-42", True), ("42", "$42$", True), ("1234567", "1,234,567", True), ("[41, 42]", "42", True),
        ("100000000000000000001", "1e20", False), ("1e20", "100000000000000000000", True),
        ("142", "42", False), ("421", "42", False), ("3.42", "42", False), ("42.5", "42", False), ("-42", "42", False),
        ("x42", "42", False), ("", "42", False), ("42", "", False), ("42", " ", False), ("NaN", "nan", False),
        ("blue", "blue", True), ("blueish", "blue", False), ("x + 1", "x + 1", True), ("1/2", "1/2", True),
        ("11/2", "1/2", False),
    ],
)  # fmt: skip
def test_an_answer_stands_in_an_output_by_itself(output, answer, held):
    assert holds_answer(output, answer) is held


@given(st.integers(), st.text(alphabet="abc:= \n()[]", max_size=10), st.text(alphabet=" \n),;:", max_size=5))
def test_a_printed_number_is_found(number, before, after):
    between = "" if not before or not before[-1].isalnum() else " "
    assert holds_answer(before + between + str(number) + after, str(number))


@given(st.text(max_size=60), st.text(max_size=20))
def test_any_output_and_any_answer_are_compared(output, answer):
    assert holds_answer(output, answer) in (True, False)


# -- ATTC and DTSR ---------------------------------------------------------------------------------------------------


def test_trust_is_of_turns_and_confidence_of_calls():
    rows = [
        trajectory(notes=attc([1.0, 0.95, 0.05], unscorable=1, trusted=2, timed_out=1, silent=1)),
        trajectory(notes=attc([0.9], reconsidered=1)),
        trajectory(notes=attc([])),
    ]
    figures = tool_figures(rows)
    assert (figures["attc/trust"], figures["attc/unscorable"]) == (0.4, 0.2)
    assert figures["attc/confidence"] == pytest.approx(0.725)
    bins = {name: value for name, value in figures.items() if name.startswith("attc/confidence/")}
    assert len(bins) == 10 and sum(bins.values()) == pytest.approx(1.0)
    assert (
        bins["attc/confidence/0.9-1.0"] == 0.75 and bins["attc/confidence/0.0-0.1"] == 0.25
    )  # .9 and 1 are both in it


@given(st.lists(st.floats(0, 1), min_size=1))
def test_bins_hold_every_confidence_once(values):
    figures = tool_figures([trajectory(notes=attc(values, trusted=1))])
    shares = [value for name, value in figures.items() if name.startswith("attc/confidence/")]
    assert sum(shares) == pytest.approx(1.0) and np.mean(values) == pytest.approx(figures["attc/confidence"])


def test_checks_and_what_closing_left_unspent():
    rows = [
        trajectory(notes=dtsr(3, 1, 40, 50.0, 100.0), tokens=50),
        trajectory(notes=dtsr(1, 0, None, 60.0), tokens=100),
        trajectory(notes=dtsr(0, 0, None), tokens=100),
        trajectory(tokens=100),  # of a run without it
    ]
    figures = tool_figures(rows, response_tokens=100)
    assert figures["dtsr/checks"] == pytest.approx(4 / 3) and figures["dtsr/closed"] == pytest.approx(1 / 3)
    assert figures["dtsr/parse_failures"] == 0.25 and figures["dtsr/sufficiency"] == 70.0
    assert figures["dtsr/unspent"] == 50.0
    assert figures["dtsr/asked_tokens"] == pytest.approx(20 / 3) and figures["dtsr/not_asked"] == 1.0
    assert "dtsr/unspent" not in tool_figures(rows) and "tools/used" not in figures


def test_dtsr_that_never_checked_claims_no_shares_of_checks():
    figures = tool_figures([trajectory(notes=dtsr(0, 0, None))], response_tokens=9)
    assert figures["dtsr/checks"] == figures["dtsr/closed"] == 0.0
    assert not {"dtsr/parse_failures", "dtsr/sufficiency", "dtsr/unspent"} & set(figures)


def test_control_text_that_had_no_room_is_counted():
    rows = [trajectory(notes=attc([1.0], trusted=1) | {"control": {"left_out": 1}}), trajectory(notes=attc([]))]
    assert tool_figures(rows)["control/left_out"] == 0.5


def test_masked_rewards_are_no_wrong_answers():
    row = replace(trajectory(("ok", "42")), reward=RewardRecord(None, "deadline"))
    assert "tools/ignored" not in tool_figures([row, replace(row, reward=None)], [RECORD] * 2)


# -- where they are told ---------------------------------------------------------------------------------------------


def test_an_evaluation_says_that_it_is_one_and_tells_of_its_sampled_answers():
    asked = []

    def rollouts(jobs, sampling, what):
        asked.append((sampling, what))
        uses = (ToolUse(0, "python", "ok", "", "42"),) if sampling.temperature else ()
        made = [sampled(job, 0.0, False) for job in jobs]
        return RolloutResult([replace(t, calls=uses, notes=dtsr(1, 0, 1, 100.0)) for t in made], {}, 0.0, 0.0)

    figures, drawn = evaluate(rollouts, [RECORD], 2, Sampling(1.0, 8, 10), seed=0, greedy=True)
    assert asked == [(Sampling(1.0, 8, 10, True), "evaluate"), (Sampling(0.0, 8, 10, True), "evaluate greedy")]
    assert len(drawn) == 2 and figures["avg@2"] == 0.0
    assert figures["tools/used"] == figures["tools/ignored"] == figures["dtsr/closed"] == 1.0
    assert figures["dtsr/unspent"] == 8.0  # of 10 tokens, 2 were sampled


def test_an_evaluation_without_tools_tells_nothing_of_them():
    def rollouts(jobs, sampling, what):
        return RolloutResult([sampled(job, 1.0, True) for job in jobs], {}, 0.0, 0.0)

    figures, _ = evaluate(rollouts, [RECORD], 1, Sampling(1.0, 8, 10), seed=0, greedy=False)
    assert not any(name.startswith(("tools/", "attc/", "dtsr/", "control/")) for name in figures)


def test_lines_for_people_hold_the_figures():
    calls = [("ok", "42"), ("timeout", "")]
    rows = [trajectory(*calls, correct=False, notes=attc([1.0, 0.5], trusted=1, timed_out=1) | dtsr(3, 0, 9, 100.0))]
    lines = "\n".join(_tool_lines(tool_figures(rows, [RECORD])))
    for part in ("100.0% of the samples, 2.00 calls", "ok 50.0%, timeout 50.0%", "0.0% ignored", "50.0% of the turns",
                 "closed in 100.0% of the samples, 3.00 checks"):  # fmt: skip
        assert part in lines
    assert "oom" not in lines and list(_tool_lines({})) == []
