"""Per-sequence results of a training step, on the host: what its passes found out, by sequence number."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

COLUMNS = ("old", "new", "entropy", "ref", "hidden")


class Tables:
    """A column is a tensor a sequence over its sampled tokens, or None: `hidden` [n, d], every other one fp32 [n]."""

    def __init__(self, sequences: int) -> None:
        self.columns: dict[str, list[torch.Tensor | None]] = {name: [None] * sequences for name in COLUMNS}

    def put(self, lengths: np.ndarray, sequences: Sequence[int], **values: torch.Tensor) -> None:
        """values [M, ...]: the sampled tokens of `sequences`, end to end. `lengths` [B]: those of each sequence."""
        sizes = [int(lengths[s]) for s in sequences]
        for name, value in values.items():
            for sequence, part in zip(sequences, value.detach().cpu().split(sizes), strict=True):
                self.columns[name][sequence] = part

    def flat(self, name: str, sequences: Sequence[int]) -> torch.Tensor | None:
        """[M, ...]: the column of these sequences, end to end; None unless it is known of every one of them."""
        parts = [part for part in (self.columns[name][s] for s in sequences) if part is not None]
        return torch.cat(parts) if parts and len(parts) == len(sequences) else None

    def drop(self, name: str, sequences: Sequence[int]) -> None:
        """Let go of what is not needed again."""
        for sequence in sequences:
            self.columns[name][sequence] = None

    def arrays(self, name: str) -> list[np.ndarray | None]:
        """The column in numpy, in the order of the batch."""
        return [None if part is None else part.numpy() for part in self.columns[name]]
