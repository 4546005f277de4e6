"""Padded batches of all runs of a stack, on the device: made once a training step, read row by row."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from rltk.learner.packing import RaggedBatch
from rltk.learner.scored import sequence_columns


@dataclass(frozen=True)
class Tables:
    """R runs, B rows (the most that a run has), L tokens; column c of a token field is about token first + 1 + c."""

    ids: Tensor  # [R, B, L]
    fields: dict[str, Tensor]  # mask, mu, old [R, B, C, ...]; advantage, group, reward, pass_rate, ... [R, B]
    length: np.ndarray  # [R, B], 0 where a run has no such row
    first: int  # the last place that stands before every sampled token

    @classmethod
    def of(cls, batches: Sequence[RaggedBatch], advantage: Sequence[Tensor], device: torch.device) -> Tables:
        rows = max(len(b.reward) for b in batches)
        length = np.zeros((len(batches), rows), np.int64)
        for run, batch in enumerate(batches):
            length[run, : len(batch.reward)] = batch.lengths
        ids = np.zeros((*length.shape, int(length.max())), np.int64)
        mask, mu = np.zeros(ids.shape, bool), np.zeros(ids.shape, np.float32)
        for run, batch in enumerate(batches):
            at = np.arange(ids.shape[2]) < length[run, :, None]  # rows laid end to end fill these places in order
            ids[run][at], mask[run][at] = batch.ids, batch.mask
            mu[run][at] = np.where(batch.mask, batch.mu, 0.0)
        first = int(mask.any((0, 1)).argmax()) - 1
        flat = {"mask": torch.from_numpy(mask[:, :, first + 1 :]), "mu": torch.from_numpy(mu[:, :, first + 1 :])}
        flat["old"] = torch.full_like(flat["mu"], torch.nan)
        columns = [
            {"advantage": a, "group": torch.from_numpy(b.group), **sequence_columns(b)}
            for a, b in zip(advantage, batches, strict=True)
        ]
        for name in columns[0]:
            flat[name] = torch.nn.utils.rnn.pad_sequence([c[name] for c in columns], batch_first=True)
        return cls(torch.from_numpy(ids).to(device), {n: v.to(device) for n, v in flat.items()}, length, first)

    def index(self, rows: Sequence[np.ndarray]) -> np.ndarray:
        """Row numbers [R, W]; -1 where a run has fewer than W."""
        index = np.full((len(rows), max(map(len, rows))), -1)
        for run, numbers in enumerate(rows):
            index[run, : len(numbers)] = numbers
        return index

    def longest(self, index: np.ndarray, runs: slice = slice(None)) -> int:
        """Tokens of the longest of these rows; at least enough for one column."""
        length = np.take_along_axis(self.length[runs], index.clip(min=0), 1)
        return max(int(np.where(index >= 0, length, 0).max()), self.first + 2)

    def take(self, index: np.ndarray) -> dict[str, Tensor]:
        """The fields of rows `index` [R, W]. `old` is mu where nobody computed it."""
        rows = torch.from_numpy(index).clamp(min=0).to(self.ids.device)
        columns = self.longest(index) - self.first - 1
        taken = {}
        runs = torch.arange(len(rows), device=rows.device)[:, None]
        for name, value in self.fields.items():
            found = value[runs, rows]
            taken[name] = found[:, :, :columns] if found.ndim > 2 else found
        taken["old"] = torch.where(taken["old"].isfinite(), taken["old"], taken["mu"])
        return taken
