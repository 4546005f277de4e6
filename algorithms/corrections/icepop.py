"""IcePop (2510.18855; as verl has it): importance weight inside a band, nothing at all outside of it."""

from __future__ import annotations

import torch
from torch import Tensor

from rltk.algorithms.batch import TokenBatch
from rltk.algorithms.corrections.correction import Correction
from rltk.algorithms.options import option


class IcePop(Correction):
    """Per-token weight w = exp(old_t - mu_t) where low <= w <= high; every other token is dropped from the loss."""

    low: float = option(0.5, low=0.0, high=1.0)
    high: float = option(5.0, low=1.0)

    def __call__(self, batch: TokenBatch) -> tuple[Tensor, Tensor]:
        weight = self.log_ratio(batch).exp()
        kept = (weight >= self.low) & (weight <= self.high)
        return torch.where(kept, weight, 0.0), kept
