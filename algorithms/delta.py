"""DelTA (2605.21467; code: RUCBM/DelTA): DAPO whose tokens weigh by how well they tell right answers from wrong ones.

    v_t   = (1 - p_t) h_t        p_t the token's probability, h_t the hidden state that predicts it: what the token's
                                 log-probability asks of its row of the output head
    c+    = sum of A v over tokens with A > 0 / sum of A;  c- the same with -A where A < 0        the two centroids
    m_t   = |v_t - c_other|^2 - |v_t - c_own|^2        margin: nearer to its own side than to the other
    w_t   = .8 + .4 sigmoid(m_t / sd of the side's margins), .8 where A = 0; then divided by its mean over all tokens

A refinement computes the centroids again, each token counting sigmoid(m / sd) times; the release does one, and scales
by the deviation of the margins before it. w multiplies the advantage. As in the release no group is refused for equal
rewards, and the centroid of a side without tokens is the origin.
Choices of ours: everything is summed over all ranks (the release: over one), and anew for each optimizer batch from
the weights before the training step (the release: once for all of its minibatches).
"""

from __future__ import annotations

import math
from dataclasses import replace

import torch
from torch import Tensor

from rltk.algorithms.batch import TokenBatch, Totals
from rltk.algorithms.dapo import DAPO
from rltk.algorithms.objective import Reduce
from rltk.algorithms.options import option

TINY = 1e-8  # of a sum of advantages or a variance of margins: less than this is none


class DelTA(DAPO):
    """`prepare` turns advantages into `[B, T]` and hands back the hidden states emptied to `[B, T, 0]`."""

    dynamic_sampling = False
    refinements: int = option(1, low=0)
    weight_low: float = option(0.8, above=0.0, high=1.0)
    weight_high: float = option(1.2, low=1.0)

    _spread: float = math.nan  # sd of w over the optimizer batch, all ranks

    @property
    def needs(self) -> frozenset[str]:
        return super().needs | {"hidden"}

    @torch.no_grad()
    def prepare(self, shard: TokenBatch, reduce: Reduce | None = None, first: bool = True) -> TokenBatch:
        """Weighs the advantages by w. A rank without sequences passes `hidden` of shape `[0, T, d]`."""
        shard = super().prepare(shard, reduce, first)
        if shard.hidden is None:
            raise ValueError(f"{self!r} needs hidden in the batch, but it is None")
        advantage = self.token_advantage(shard)
        advantage[shard.mask] *= self._weights(shard, advantage[shard.mask], reduce or (lambda value: value))
        return replace(shard, advantage=advantage, hidden=shard.hidden.new_zeros(*shard.hidden.shape[:2], 0))

    def loss(self, batch: TokenBatch, totals: Totals | None = None) -> tuple[Tensor, dict[str, Tensor]]:
        if batch.hidden is not None and batch.hidden.shape[2] > 0:
            if totals is not None:
                raise ValueError("delta: call prepare with the optimizer batch before the losses of its micro-batches")
            batch = self.prepare(batch)  # the batch is all there is
        return super().loss(batch, totals)

    def token_loss(self, batch: TokenBatch) -> tuple[Tensor, dict[str, Tensor]]:
        loss, metrics = super().token_loss(batch)
        return loss, metrics | {"weight/sd": torch.full_like(batch.old, self._spread)}

    def _weights(self, shard: TokenBatch, advantage: Tensor, reduce: Reduce) -> Tensor:
        """w of each masked token, `[M]`, as `advantage` is."""
        assert shard.hidden is not None
        vectors = shard.hidden[shard.mask].to(advantage.dtype) * (1 - shard.old[shard.mask].exp())[:, None]  # [M, d]
        sides = torch.stack([advantage, -advantage]).clamp(min=0.0)  # [2, M]

        margin = _margins(vectors, _centroids(vectors, sides, reduce), advantage)
        scale = _deviations(margin, advantage, reduce)
        for _ in range(self.refinements):
            belonging = torch.sigmoid(margin / scale)
            scale = _deviations(margin, advantage, reduce)
            margin = _margins(vectors, _centroids(vectors, sides * belonging, reduce), advantage)

        weight = self.weight_low + (self.weight_high - self.weight_low) * torch.sigmoid(margin / scale)
        weight = torch.where(advantage == 0, self.weight_low, weight).double()
        count, total = reduce(torch.stack([torch.ones_like(weight).sum(), weight.sum()]))
        weight = weight / (total / count)
        self._spread = float((reduce(((weight - 1) ** 2).sum()) / count).sqrt())
        return weight.to(advantage.dtype)


def _centroids(vectors: Tensor, counts: Tensor, reduce: Reduce) -> Tensor:
    """Means of vectors `[M, d]` by the weights of either side, `[2, M]`, over all ranks: `[2, d]`."""
    sums = reduce(torch.cat([counts @ vectors, counts.sum(dim=1, keepdim=True)], dim=1))
    return sums[:, :-1] / sums[:, -1:].clamp(min=TINY)


def _margins(vectors: Tensor, centroids: Tensor, advantage: Tensor) -> Tensor:
    """|v - other|^2 - |v - own|^2 of each token `[M]`: the squares of v cancel."""
    right, wrong = centroids
    margin = 2 * vectors @ (right - wrong) - (right @ right - wrong @ wrong)
    return margin * advantage.sign()


def _deviations(margin: Tensor, advantage: Tensor, reduce: Reduce) -> Tensor:
    """For each token `[M]` the standard deviation of the margins of its own side, over all ranks."""
    of_side = torch.stack([advantage > 0, advantage < 0]).double()
    powers = torch.stack([torch.ones_like(margin), margin, margin**2], dim=1).double()
    count, total, square = reduce(of_side @ powers).T
    deviation = (square / count - (total / count) ** 2).clamp(min=TINY).sqrt()  # nan for a side without tokens
    of_token = torch.where(advantage < 0, deviation[1], deviation[0])
    return torch.where(advantage == 0, 1.0, of_token).to(margin.dtype)  # on neither side: any finite number
