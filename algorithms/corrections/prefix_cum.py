"""CTPO's idea applied to the sampler's error (ours): each token weighted by the ratio of everything up to it.

    weight_t = min(exp(sum_{s<=t} (old_s - mu_s)), cap)

Before the cap this is the exact importance weight of the prefix that token t ends. Tool output is transparent.
"""

from __future__ import annotations

from torch import Tensor

from rltk.algorithms.batch import TokenBatch
from rltk.algorithms.corrections.correction import Correction
from rltk.algorithms.options import option


class PrefixCumulative(Correction):
    """Cumulative ratio of the sampled tokens up to and including this one, at most `cap`."""

    cap: float = option(2.0, low=1.0)

    def __call__(self, batch: TokenBatch) -> tuple[Tensor, Tensor]:
        return self._cumulative(batch).clamp(max=self.cap), batch.mask

    def touched(self, batch: TokenBatch, weight: Tensor, kept: Tensor) -> Tensor:
        return self._cumulative(batch) > self.cap

    def _cumulative(self, batch: TokenBatch) -> Tensor:
        return self.log_ratio(batch).cumsum(dim=1).exp()  # may overflow, and is then the cap
