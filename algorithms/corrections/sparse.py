"""Sparse-RL (2601.10079; code: the release's configuration): for samplers with a compressed cache.

    w_t      = exp(old_t - mu_t)
    weight_t = min(w_t, high) / mean(min(w, high))        the mean over all sampled tokens of the optimizer batch
    dropped:   tokens with w_t outside [low, high], and every token of a sequence with any w_t < veto

Choices of ours: the mean is over all ranks (the release's is a micro-batch's), and a sequence's length counts all of
its tokens. denominator=kept counts only those kept, as the release does; a vetoed sequence still counts as a sequence.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor

from rltk.algorithms.batch import TokenBatch
from rltk.algorithms.corrections.correction import Correction
from rltk.algorithms.options import option


class Sparse(Correction):
    """Truncated, normalised to mean 1, then masked. Before any `prepare` the batch at hand is taken for the whole.

    `denominator` matters for the seq-mean-token-mean aggregation only; the totals keep every token.
    """

    low: float = option(0.5, low=0.0, high=1.0)
    high: float = option(1.5, low=1.0)
    veto: float = option(1e-4, low=0.0, high=1.0)
    denominator: Literal["all", "kept"] = option("all", choices=("all", "kept"))

    batch_statistic = True

    _mean: Tensor | None = None  # of the truncated weights, over the optimizer batch's sampled tokens, all ranks

    def __call__(self, batch: TokenBatch) -> tuple[Tensor, Tensor]:
        raw = self.log_ratio(batch).exp()
        mean = self._of(batch, lambda sums: sums) if self._mean is None else self._mean
        vetoed = (raw < self.veto).any(dim=1, keepdim=True)  # 1 outside the mask: never under the veto
        kept = (raw >= self.low) & (raw <= self.high) & ~vetoed
        return raw.clamp(max=self.high) / mean.to(raw), kept

    def prepare(self, shard: TokenBatch, reduce: Callable[[Tensor], Tensor]) -> None:
        self._mean = self._of(shard, reduce)

    def lengths(self, batch: TokenBatch, kept: Tensor) -> Tensor:
        return (batch.mask & kept).sum(dim=1) if self.denominator == "kept" else batch.masked_lengths

    def _of(self, batch: TokenBatch, reduce: Callable[[Tensor], Tensor]) -> Tensor:
        truncated = self.log_ratio(batch).exp().clamp(max=self.high)[batch.mask].double()
        total, count = reduce(torch.stack([truncated.sum(), truncated.new_tensor(float(truncated.numel()))]))
        return torch.where(count > 0, total / count, 1.0)  # padding alone: nothing to normalise
