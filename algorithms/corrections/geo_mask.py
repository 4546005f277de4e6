"""Geometric rejection, as verl has it (`decoupled_geo_rs`): sequences whose mean log-ratio is off are dropped.

    g = exp(mean_t (old_t - mu_t))        the whole sequence is dropped unless low <= g <= high

The mean is as tight for a long sequence as for a short one, where a product is not; it says nothing of single tokens.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from rltk.algorithms.batch import TokenBatch
from rltk.algorithms.corrections.correction import Correction
from rltk.algorithms.options import option


class GeometricMask(Correction):
    """Weight 1 for what is kept: a filter, not an importance weight. The mean is over the sampled tokens."""

    low: float = option(0.999, above=0.0, high=1.0)
    high: float = option(1.001, low=1.0)

    def __call__(self, batch: TokenBatch) -> tuple[Tensor, Tensor]:
        mean = self.log_ratio(batch).sum(dim=1, keepdim=True) / batch.mask.sum(dim=1, keepdim=True)
        kept = (mean >= math.log(self.low)) & (mean <= math.log(self.high))
        return torch.ones_like(batch.old), kept.expand_as(batch.old)
