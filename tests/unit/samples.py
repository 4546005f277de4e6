"""A task and trajectories of it as rollouts leave them, for tests of what comes after."""

from __future__ import annotations

from rltk.rollout.worker import Job
from rltk.trajectory import Record, RewardRecord, Segment, Trajectory


class Numbers:
    """Problems whose level is their index modulo 3."""

    name = "numbers"

    def __init__(self, size: int | None) -> None:
        self.size = size

    def problem(self, index: int) -> Record:
        return Record(f"numbers/{index}", ({"role": "user", "content": str(index)},), "", str(index % 3))

    def held_out(self, count: int) -> list[Record]:
        return []

    def score(self, record: Record, text: str) -> RewardRecord:
        return RewardRecord(0.0)


def sampled(job: Job, value: float | None, correct: bool | None = None, tokens: int = 2) -> Trajectory:
    """`tokens` sampled tokens after a prompt of one, with this reward."""
    prompt = Segment("prompt", [1])
    model = Segment("model", [2] * tokens, [-0.5] * tokens, (0, 0), "stop")
    return Trajectory(job.uid, job.record.id, job.group, (prompt, model), "", RewardRecord(value, "why", correct))
