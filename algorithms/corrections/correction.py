"""Base of corrections: what is done about the sampler not being the learner (cache, precision, staleness)."""

from __future__ import annotations

from collections.abc import Callable
from typing import ClassVar

from torch import Tensor

from rltk.algorithms.batch import TokenBatch
from rltk.algorithms.kl import masked_log_ratio
from rltk.algorithms.options import Configurable


class Correction(Configurable):
    """Maps a batch to `(weight [B, T], kept [B, T] bool)`, both without gradient.

    The weight multiplies the already clipped loss of any objective; a token that is not kept is left out of it. Totals,
    and so every denominator, keep the original loss mask. A subclass writes `__call__`, and where needed the rest.
    """

    batch_statistic: ClassVar[bool] = False  # True: needs `old` of the whole optimizer batch in `prepare`

    def __call__(self, batch: TokenBatch) -> tuple[Tensor, Tensor]:
        raise NotImplementedError(f"{type(self).__name__} does not say what its weights are: write __call__(batch)")

    def prepare(self, shard: TokenBatch, reduce: Callable[[Tensor], Tensor]) -> None:
        """Once per optimizer batch, before its losses: normalisers over all ranks (`reduce` sums over them)."""

    def touched(self, batch: TokenBatch, weight: Tensor, kept: Tensor) -> Tensor:
        """bool `[B, T]`: tokens on which the correction did more than weight them; reported as a share."""
        return ~kept

    def metrics(self, batch: TokenBatch, weight: Tensor, kept: Tensor) -> dict[str, Tensor]:
        """Figures of its own to log, each `[B, T]` or `[B]`, added up as `Objective.loss` says."""
        return {}

    def lengths(self, batch: TokenBatch, kept: Tensor) -> Tensor:
        """`[B]`: how many tokens each sequence counts for in the `seq-mean-token-mean` aggregation."""
        return batch.masked_lengths

    @staticmethod
    def log_ratio(batch: TokenBatch) -> Tensor:
        """old - mu, `[B, T]`, clamped to +-20, 0 where the mask is 0: learner against sampler at the same weights."""
        return masked_log_ratio(batch.mask, batch.old, batch.mu)
