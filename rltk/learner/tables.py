"""Per-sequence results of a training step, on the host: what passes before the loss found out, by sequence number."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from rltk.learner.packing import RaggedBatch


class Tables:
    """Columns `old`, `new`, `entropy`, `ref`: per sequence a float32 array over its sampled tokens, or None."""

    def __init__(self, sequences: int) -> None:
        self.columns: dict[str, list[np.ndarray | None]] = {
            name: [None] * sequences for name in ("old", "new", "entropy", "ref")
        }

    def put(self, lengths: np.ndarray, sequences: Sequence[int], **values: torch.Tensor) -> None:
        """values [M]: the sampled tokens of `sequences`, end to end. `lengths` [B]: sampled tokens of each sequence."""
        bounds = np.cumsum([lengths[s] for s in sequences])[:-1]
        for name, value in values.items():
            for sequence, part in zip(sequences, np.split(value.float().cpu().numpy(), bounds), strict=True):
                self.columns[name][sequence] = part

    def has(self, name: str, sequences: Sequence[int]) -> bool:
        return all(self.columns[name][s] is not None for s in sequences)

    def flat(self, name: str, sequences: Sequence[int]) -> torch.Tensor:
        """float32 [M]: the column of these sequences, end to end."""
        parts = [self.columns[name][s] for s in sequences]
        return torch.from_numpy(np.concatenate(parts)) if parts else torch.zeros(0)  # type: ignore[arg-type]


@dataclass(frozen=True)
class Verdict:
    value: float | None
    correct: bool | None
    flawed: bool | None


@dataclass(frozen=True)
class ScoredSample:
    """What an objective's `shape_rewards` reads of a sample."""

    reward: Verdict
    length: int


def groups_of(batch: RaggedBatch) -> list[tuple[np.ndarray, list[ScoredSample]]]:
    """(sequence numbers, samples) of each group."""

    def label(value: np.int8) -> bool | None:
        return None if value < 0 else bool(value)

    lengths = batch.masked_lengths
    samples = [
        ScoredSample(Verdict(None if np.isnan(r) else float(r), label(c), label(f)), int(n))
        for r, c, f, n in zip(batch.reward, batch.correct, batch.flawed, lengths, strict=True)
    ]
    members = [np.flatnonzero(batch.group == g) for g in np.unique(batch.group)]
    return [(member, [samples[i] for i in member]) for member in members]
