"""Sequence-level masked importance sampling, as TRL has it (`sequence_mask`): weight the sequence, or drop it.

    W = exp(sum_t (old_t - mu_t))        weight W for every token of the sequence; dropped if W > cap

It drops long sequences first, as the spread of the sum grows with length, and so reports the dropped share by quartile
of length. There is no lower end: at sd .02 a token a two-sided band keeps 15 % of sequences of 16 000 tokens.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from rltk.algorithms.batch import TokenBatch
from rltk.algorithms.corrections.correction import Correction
from rltk.algorithms.options import option

LONGEST = 2**17  # tokens; the histogram over ranks ends here, and longer sequences count as this long


class SequenceMask(Correction):
    """Per-sequence weight W, 0 if W > cap. `prepare` finds the quartiles of length over the whole optimizer batch."""

    cap: float = option(3.0, low=1.0)

    # Quartile edges [3] and number of sequences in each quartile [4], over all ranks; None: `prepare` was not called.
    _quartiles: tuple[Tensor, Tensor] | None = None

    def __call__(self, batch: TokenBatch) -> tuple[Tensor, Tensor]:
        weight = self.log_ratio(batch).sum(dim=1, keepdim=True).exp().expand_as(batch.old)
        kept = weight <= self.cap  # an overflow is dropped too
        return torch.where(kept, weight, 0.0), kept

    def prepare(self, shard: TokenBatch, reduce: Callable[[Tensor], Tensor]) -> None:
        lengths = _lengths(shard)
        below = reduce(torch.bincount(lengths[lengths > 0], minlength=LONGEST + 1)).cumsum(0)  # sequences <= length
        count = below[-1]
        # The smallest length that a quarter, a half, three quarters of the sequences do not exceed.
        edges = torch.searchsorted(below, (count * torch.arange(1, 4, device=below.device) + 3) // 4)
        upto = torch.cat([below.new_zeros(1), below[edges], below[-1:]])
        self._quartiles = edges, upto.diff()

    def metrics(self, batch: TokenBatch, weight: Tensor, kept: Tensor) -> dict[str, Tensor]:
        """`correction/dropped_q1` (shortest) to `_q4`: dropped sequences / sequences, in that quartile of length."""
        if self._quartiles is None:
            return {}
        edges, sizes = self._quartiles
        quartile = (_lengths(batch)[:, None] > edges).sum(dim=1)
        dropped = ~kept.all(dim=1)
        # A figure of sequences will be divided by the step's number of them; this one is a share of its quartile.
        share = dropped.to(weight.dtype) * sizes.sum() / sizes[quartile].clamp(min=1)
        return {f"correction/dropped_q{q + 1}": torch.where(quartile == q, share, 0.0) for q in range(4)}


def _lengths(batch: TokenBatch) -> Tensor:
    return batch.mask.sum(dim=1).clamp(max=LONGEST)
