"""Truncated importance sampling: weight min(exp(old - mu), cap). As verl and OpenRLHF have it."""

from __future__ import annotations

from torch import Tensor

from rltk.algorithms.batch import TokenBatch
from rltk.algorithms.corrections.correction import Correction
from rltk.algorithms.options import option


class TIS(Correction):
    """Per-token weight min(exp(old_t - mu_t), cap). Unbiased up to the truncation, which bounds the variance."""

    cap: float = option(2.0, low=1.0)

    def __call__(self, batch: TokenBatch) -> tuple[Tensor, Tensor]:
        return self.log_ratio(batch).exp().clamp(max=self.cap), batch.mask

    def touched(self, batch: TokenBatch, weight: Tensor, kept: Tensor) -> Tensor:
        return self.log_ratio(batch).exp() > self.cap
