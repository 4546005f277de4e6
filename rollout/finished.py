"""From the state of a trajectory that has ended to the Trajectory it is."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from rltk.rollout.job import Job
from rltk.rollout.steps import State, TurnSettings
from rltk.rollout.texts import last_turn, model_runs, without_end
from rltk.rollout.tokens import decode
from rltk.trajectory import RewardRecord, Segment, Trajectory


def finished(job: Job, settings: TurnSettings, state: State, reason: str) -> Trajectory:
    """`reason`: of its Done. `notes["turns"]` says how it went; a reward is there only where it is masked: past its
    deadline, or nothing of it is to be learned from (tools.void_turns)."""
    tokenizer, enabled = settings.tokenizer, settings.options.enabled
    void = enabled and is_void(settings, state, reason)
    segments = state.segments
    if void and settings.options.void_turns == "mask":
        segments = _masked(segments)
    ids = np.concatenate([s.ids for s in state.segments[1:]]).tolist()
    response = [decode(tokenizer, run, special=False) for run in model_runs(state.segments)]
    notes: dict[str, Any] = {}
    if enabled:
        counts = {"cut": state.cut, "new_tokens": state.new_tokens}
        notes["turns"] = {"turns": state.turn + 1, "ended": reason, "void": int(void), **counts}
    for intervention in state.interventions:
        notes |= intervention.notes()
    if state.interventions:
        counts = {"asked_tokens": state.asked_tokens, "not_asked": state.not_asked}
        notes["control"] = {**counts, "left_out": state.control_left_out}
    return Trajectory(
        job.uid, job.record.id, job.group, tuple(segments), decode(tokenizer, without_end(ids, settings.stop_ids)),
        _no_reward(settings, segments, reason, void), response="\n".join(response), calls=tuple(state.uses),
        notes=notes,
    )  # fmt: skip


def is_void(settings: TurnSettings, state: State, reason: str) -> bool:
    """Its last turn has neither a call nor an answer (SimpleTIR, arXiv 2509.02479). Where there is an environment,
    every turn is an action."""
    last = last_turn(state.segments)
    if settings.environment or reason not in ("stop", "length") or not last:
        return False
    text = decode(settings.tokenizer, np.concatenate([s.ids for s in last]).tolist())
    return not any(mark in text for mark in settings.options.answer_marks)


def _masked(segments: Sequence[Segment]) -> list[Segment]:
    """The last turn as a boundary of tokens that are not learned from."""
    void = last_turn(segments)
    unlearned = [Segment("boundary", s.ids, None, s.weight_version, s.finish_reason) for s in void]
    return [*segments[: len(segments) - len(void)], *unlearned]


def _no_reward(settings: TurnSettings, segments: Sequence[Segment], reason: str, void: bool) -> RewardRecord | None:
    cause, why = "", ""
    if reason == "deadline":
        cause, why = "deadline", f"the trajectory passed tools.deadline_s={settings.options.deadline_s:g}"
    elif void and settings.options.void_turns == "drop":
        cause, why = "void_turn", "its last turn has neither call nor answer"
    elif not any(segment.kind == "model" for segment in segments):
        cause, why = "void_turn", "its only turn has neither call nor answer: nothing is left to learn from"
    return RewardRecord(None, why, detail={"cause": cause}) if cause else None
