"""Held-out evaluation: the same engine, worker and reward path as training; nothing is learned."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, Protocol

from rltk.genrm_metrics import genrm_figures
from rltk.rollout.worker import Job, RolloutResult, Sampling
from rltk.statistics import evaluate_summary
from rltk.tool_metrics import tool_figures
from rltk.trajectory import Record, Trajectory

Figures = Callable[[Sequence[Record], Sequence[Trajectory]], dict[str, float]]  # of trajectories and their records


class Rollouts(Protocol):
    """What rolls jobs out (the driver's pool of workers)."""

    def __call__(self, jobs: Sequence[Job], sampling: Sampling, what: str) -> RolloutResult: ...


def evaluate(
    rollouts: Rollouts,
    records: Sequence[Record],
    samples: int,
    sampling: Sampling,
    seed: int,
    greedy: bool,
    own: Figures | None = None,
) -> tuple[dict[str, Any], list[Trajectory]]:
    """`samples` samples a problem at the sampling temperature, and one greedy answer if asked for.

    Returns the figures of `rltk.statistics.evaluate_summary`, `rltk.tool_metrics.tool_figures` and
    `rltk.genrm_metrics.genrm_figures`, and the trajectories. Seeds depend on (seed, problem, sample) alone, so that
    two evaluations of the same weights are the same. `own` is the task's `figures`, which stand beside ours, and as
    greedy/<name> once more for the greedy answers.
    """
    sampling = replace(sampling, evaluation=True)  # whoever asks: the run's own sampling serves training too
    jobs = [_job(record, sample, seed) for record in records for sample in range(samples)]
    drawn = rollouts(jobs, sampling, "evaluate").trajectories
    answers: list[Trajectory] = []
    if greedy:
        at_zero = replace(sampling, temperature=0.0)
        answers = rollouts([_job(record, -1, seed) for record in records], at_zero, "evaluate greedy").trajectories
    verdicts = {t.uid: t.reward for t in (*drawn, *answers) if t.reward is not None}

    def verdict(record: Record, sample: int, field: str) -> bool | None:
        found = verdicts.get(_uid(record, sample))
        return None if found is None else getattr(found, field)

    figures = evaluate_summary(
        [[verdict(r, s, "correct") for s in range(samples)] for r in records],
        [r.level for r in records] if any(r.level for r in records) else None,
        [verdict(r, -1, "correct") for r in records] if greedy else None,
        [[verdict(r, s, "flawed") for s in range(samples)] for r in records],
    )
    if drawn:
        figures["length"] = sum(t.length for t in drawn) / len(drawn)
        figures["truncated"] = sum(t.truncated for t in drawn) / len(drawn)
        by_id = {record.id: record for record in records}
        figures |= tool_figures(drawn, [by_id[t.prompt_id] for t in drawn], sampling.max_response_tokens)
        figures |= genrm_figures(drawn)
    if own is not None:
        figures |= _own(own, records, drawn)
        figures |= {f"greedy/{name}": value for name, value in _own(own, records, answers).items()}
    return figures, drawn


def _own(own: Figures, records: Sequence[Record], trajectories: Sequence[Trajectory]) -> dict[str, float]:
    by_id = {record.id: record for record in records}
    return own([by_id[t.prompt_id] for t in trajectories], trajectories) if trajectories else {}


def _uid(record: Record, sample: int) -> str:
    return f"held-out/{record.id}/{sample}"


def _job(record: Record, sample: int, seed: int) -> Job:
    digest = hashlib.blake2b(f"held-out/{seed}/{record.id}/{sample}".encode(), digest_size=8).digest()
    return Job(_uid(record, sample), record.id, record, int.from_bytes(digest, "big") % (1 << 31))
