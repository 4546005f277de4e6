"""What trajectories say about tools, trust in them (ATTC) and thought that was closed early (DTSR). Pure numpy."""

from __future__ import annotations

import re
from collections.abc import Sequence
from decimal import Decimal, InvalidOperation
from typing import Any

import numpy as np

from rltk.errors import MismatchError
from rltk.rollout.tools.types import STATUSES
from rltk.trajectory import Record, ToolUse, Trajectory

BINS = 10
VERDICTS = ("trusted", "reconsidered", "timed_out", "silent")  # what a turn with calls was met with (rollout/attc.py)
NUMBER = re.compile(r"(?<![\w.])-?\d+(?:\.\d+)?(?:[eE][+-]?\d+)?(?!\w)")


def tool_figures(
    trajectories: Sequence[Trajectory], records: Sequence[Record] | None = None, response_tokens: int = 0
) -> dict[str, float]:
    """All figures of some trajectories; {} for a run without tools and interventions. MismatchError if there are not as
    many `records`, each trajectory's, as trajectories. `response_tokens`: what one may sample (0: not said).

    tools/used                 share of trajectories with a call; tools/calls: calls a trajectory
    tools/status/<status>      share of the calls that ended so
    tools/queue_s              mean seconds that a call waited for a place; tools/queue_s_p95: their 95th percentile;
                               tools/run_s, tools/cpu_s and their _p95 likewise
    tools/tokens               tokens of results a trajectory
    tools/truncated            results that were cut, a trajectory
    tools/void_turns           share of trajectories that end in a turn with neither call nor answer
    tools/ignored              of the wrong final answers with a call: the last result held the right one
    attc/trust                 share of the turns with calls whose result was followed by the sentence that believes it
    attc/confidence            mean over calls; attc/confidence/0.9-1.0, ...: shares of the calls in ten bins
    attc/unscorable            share of the calls whose tokens could not be told apart
    dtsr/checks                checks a trajectory; dtsr/closed: share of trajectories whose thought a check closed
    dtsr/parse_failures        share of the checks whose reply was no number; dtsr/sufficiency: mean of the others
    dtsr/asked_tokens          tokens sampled for replies, a trajectory; dtsr/not_asked: questions over the context
    dtsr/unspent               tokens that a closed one left of what it might sample: closing saved no more than that
    control/tokens             tokens of control text a trajectory; control/left_out: texts for which there was no room
    """
    if records is not None and len(records) != len(trajectories):
        raise MismatchError(f"{len(records)} records for {len(trajectories)} trajectories")
    figures = _calls(trajectories) | _ignored(trajectories, records or [])
    figures |= _attc([t.notes["attc"] for t in trajectories if "attc" in t.notes])
    figures |= _dtsr([t for t in trajectories if "dtsr" in t.notes], response_tokens)
    if figures:
        figures["control/tokens"] = np.mean([_tokens(t, "control") for t in trajectories])
        figures["control/left_out"] = np.mean([_control(t, "left_out") for t in trajectories])
    return {name: float(value) for name, value in figures.items()}


def holds_answer(output: str, answer: str) -> bool:
    """Whether `answer` stands in a tool's output by itself: as a number of the same value (4, 4.0), or as a word."""
    answer = answer.strip().strip("$").strip()
    if not answer:
        return False
    number = _number(answer.replace(",", ""))
    if number is not None:
        return any(_number(found) == number for found in NUMBER.findall(output))
    return re.search(rf"(?<!\w){re.escape(answer)}(?!\w)", output) is not None


def _calls(trajectories: Sequence[Trajectory]) -> dict[str, Any]:
    turns = [t.notes["turns"] for t in trajectories if "turns" in t.notes]
    calls = [call for t in trajectories for call in t.calls]
    if not (turns or calls):
        return {}
    figures: dict[str, Any] = {
        "tools/used": np.mean([bool(t.calls) for t in trajectories]),
        "tools/calls": len(calls) / len(trajectories),
        "tools/tokens": np.mean([_tokens(t, "tool") for t in trajectories]),
    }
    if turns:
        figures["tools/void_turns"] = np.mean([turn.get("void", 0) for turn in turns])
        figures["tools/truncated"] = np.mean([turn.get("cut", 0) for turn in turns])
    return figures | _of_calls(calls)


def _of_calls(calls: Sequence[ToolUse]) -> dict[str, Any]:
    if not calls:
        return {}
    statuses = [call.status for call in calls]
    figures: dict[str, Any] = {
        f"tools/status/{status}": statuses.count(status) / len(calls)
        for status in STATUSES
        if status != "infra_error" or status in statuses  # of a sample that is kept, no call ends so
    }
    for name in ("queue_s", "run_s", "cpu_s"):
        seconds = [getattr(call, name) for call in calls]
        figures |= {f"tools/{name}": np.mean(seconds), f"tools/{name}_p95": np.percentile(seconds, 95)}
    return figures


def _ignored(trajectories: Sequence[Trajectory], records: Sequence[Record]) -> dict[str, Any]:
    wrong = [
        holds_answer(trajectory.calls[-1].output, record.answer)
        for trajectory, record in zip(trajectories, records, strict=False)
        if trajectory.calls and record.answer and trajectory.reward is not None and trajectory.reward.correct is False
    ]
    return {"tools/ignored": np.mean(wrong)} if wrong else {}


def _attc(notes: Sequence[dict[str, Any]]) -> dict[str, Any]:
    figures: dict[str, Any] = {}
    met = {verdict: sum(note[verdict] for note in notes) for verdict in VERDICTS}
    if any(met.values()):
        figures["attc/trust"] = met["trusted"] / sum(met.values())
    confidences = [value for note in notes for value in note["confidence"]]
    unscorable = sum(note["unscorable"] for note in notes)
    if confidences or unscorable:
        figures["attc/unscorable"] = unscorable / (unscorable + len(confidences))
    if confidences:
        figures["attc/confidence"] = np.mean(confidences)
        counts, _ = np.histogram(confidences, bins=BINS, range=(0.0, 1.0))
        for number, count in enumerate(counts):
            figures[f"attc/confidence/{number / BINS:.1f}-{(number + 1) / BINS:.1f}"] = count / len(confidences)
    return figures


def _dtsr(trajectories: Sequence[Trajectory], response_tokens: int) -> dict[str, Any]:
    if not trajectories:
        return {}
    notes = [t.notes["dtsr"] for t in trajectories]
    closed = [t for t in trajectories if t.notes["dtsr"]["closed_at"] is not None]
    checks = sum(note["checks"] for note in notes)
    scores = [score for note in notes for score in note["scores"]]
    figures: dict[str, Any] = {"dtsr/checks": checks / len(notes), "dtsr/closed": len(closed) / len(notes)}
    if checks:
        figures["dtsr/parse_failures"] = sum(note["parse_failures"] for note in notes) / checks
    for name in ("asked_tokens", "not_asked"):
        figures[f"dtsr/{name}"] = np.mean([_control(t, name) for t in trajectories])
    if scores:
        figures["dtsr/sufficiency"] = np.mean(scores)
    if closed and response_tokens:
        figures["dtsr/unspent"] = np.mean([response_tokens - t.length for t in closed])
    return figures


def _tokens(trajectory: Trajectory, kind: str) -> int:
    return sum(len(segment.ids) for segment in trajectory.segments if segment.kind == kind)


def _control(trajectory: Trajectory, name: str) -> int:
    return trajectory.notes.get("control", {}).get(name, 0)


def _number(text: str) -> Decimal | None:
    try:
        number = Decimal(text)
    except InvalidOperation:
        return None
    return number if number.is_finite() else None
