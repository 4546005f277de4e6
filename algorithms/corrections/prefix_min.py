"""MinPRO's idea applied to the sampler's error (ours): a token's weight times the smallest weight before it.

    w_s = exp(old_s - mu_s)        weight_t = w_t min_{s<t} w_s        the minimum is 1 where nothing comes before

One factor stands for the whole prefix, so the variance does not grow with every token. Tool output is transparent.
"""

from __future__ import annotations

from torch import Tensor

from rltk.algorithms.batch import TokenBatch
from rltk.algorithms.corrections.correction import Correction
from rltk.algorithms.kl import LOG_RATIO_LIMIT
from rltk.algorithms.minpro import prefix_minimum
from rltk.algorithms.options import option


class PrefixMinimum(Correction):
    """The minimum is over the sampled tokens before this one. `cap` bounds the weight; null: unbounded."""

    cap: float | None = option(None, kind=float, low=1.0)

    def __call__(self, batch: TokenBatch) -> tuple[Tensor, Tensor]:
        product = self._product(batch)
        return product if self.cap is None else product.clamp(max=self.cap), batch.mask

    def touched(self, batch: TokenBatch, weight: Tensor, kept: Tensor) -> Tensor:
        return ~kept if self.cap is None else self._product(batch) > self.cap

    def _product(self, batch: TokenBatch) -> Tensor:
        log_ratio = self.log_ratio(batch)
        log_weight = log_ratio + prefix_minimum(log_ratio, batch.mask)
        return log_weight.clamp(-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT).exp()
