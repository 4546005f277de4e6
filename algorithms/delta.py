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

`prepare` reads no figure back: a GPU is still at its passes over the hidden states while the host issues the loss. The
passes there are those of kernels/delta_weights.py; `_weights` in torch is for a CPU, and what the kernels are held to.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace

import torch
from torch import Tensor

from rltk.algorithms.batch import TokenBatch, Totals
from rltk.algorithms.dapo import DAPO
from rltk.algorithms.objective import Reduce
from rltk.algorithms.options import option

TINY = 1e-8  # of a sum of advantages or a variance of margins: less than this is none
PART = 2**25  # numbers of half-precision hidden states that are made full at once: 128 MiB


class DelTA(DAPO):
    """`prepare` turns advantages into `[B, T]` and hands back the hidden states emptied to `[B, T, 0]`."""

    dynamic_sampling = False
    refinements: int = option(1, low=0)
    weight_low: float = option(0.8, above=0.0, high=1.0)
    weight_high: float = option(1.2, low=1.0)

    _spread: Tensor | float = math.nan  # sd of w over the optimizer batch, all ranks
    _unread: Tensor | None = None  # the sum of w, until the first loss has looked at it

    @property
    def needs(self) -> frozenset[str]:
        return super().needs | {"hidden"}

    @torch.no_grad()
    def prepare(self, shard: TokenBatch, reduce: Reduce | None = None, first: bool = True) -> TokenBatch:
        """Weighs the advantages by w. A rank without sequences passes `hidden` of shape `[0, T, d]`.

        Raises ValueError without hidden states.
        """
        shard = super().prepare(shard, reduce, first)
        if shard.hidden is None:
            raise ValueError(f"{self!r} needs hidden in the batch, but it is None")
        advantage = self.token_advantage(shard)
        weight = self._weights(shard, advantage, reduce or (lambda value: value))
        return replace(shard, advantage=weight * advantage, hidden=shard.hidden.new_zeros(*shard.hidden.shape[:2], 0))

    def loss(self, batch: TokenBatch, totals: Totals | None = None) -> tuple[Tensor, dict[str, Tensor]]:
        """Raises ValueError if a hidden state that `prepare` was given, under whatever mask, is not finite."""
        if batch.hidden is not None and batch.hidden.shape[2] > 0:
            if totals is not None:
                raise ValueError("delta: call prepare with the optimizer batch before the losses of its micro-batches")
            batch = self.prepare(batch)  # the batch is all there is
        result = super().loss(batch, totals)
        total, self._unread = self._unread, None
        if total is not None and not math.isfinite(total):  # read last: it waits for the GPU
            raise ValueError(f"{self!r}: hidden is not finite everywhere; it must be, where the mask is 0 too")
        return result

    def token_loss(self, batch: TokenBatch) -> tuple[Tensor, dict[str, Tensor]]:
        loss, metrics = super().token_loss(batch)
        return loss, metrics | {"weight/sd": torch.as_tensor(self._spread).to(batch.old).expand(len(batch.old))}

    def _weights(self, shard: TokenBatch, advantage: Tensor, reduce: Reduce) -> Tensor:
        """w of each token, `[B, T]`; of no meaning where the mask is 0, as the advantage is 0 there."""
        assert shard.hidden is not None
        if _fused(shard):
            from rltk.kernels.delta_weights import delta_weights  # a CPU may have no Triton

            options = self.refinements, self.weight_low, self.weight_high
            found = delta_weights(shard.hidden, shard.old, shard.mask, advantage, reduce, *options)
            weight, self._spread, self._unread = found
            return weight
        vectors = _Vectors(shard.hidden, torch.where(shard.mask, -torch.expm1(shard.old), 0.0))
        sides = torch.stack([advantage, -advantage], dim=1).clamp_(min=0.0)  # [B, 2, T]

        nearness = _nearness(vectors, _centroids(vectors, sides, reduce))
        unit = _units(nearness, sides, reduce)
        for refinement in range(self.refinements):
            if refinement > 0:
                unit = _units(nearness, sides, reduce)
            belonging = torch.sigmoid(nearness * unit)
            nearness = _nearness(vectors, _centroids(vectors, sides * belonging[:, None], reduce))

        weight = self.weight_low + (self.weight_high - self.weight_low) * torch.sigmoid(nearness * unit)
        weight = torch.where(advantage == 0, self.weight_low, weight)
        sampled = torch.where(shard.mask, weight, 0.0)
        sums = torch.stack([shard.masked_lengths.to(weight.dtype), sampled.sum(dim=1), (sampled**2).sum(dim=1)])
        count, total, square = reduce(sums.sum(dim=1, dtype=torch.float64))
        self._unread, total = total, total.clamp(min=TINY)  # no token at all: weights of 0
        self._spread = (square * count / total**2 - 1).clamp(min=0).sqrt()
        return weight * (count / total)


def _fused(shard: TokenBatch) -> bool:
    """Whether Triton kernels compute the weights. Not those of float64, which is for tests."""
    return (shard.old.device.type, shard.old.dtype) == ("cuda", torch.float32)


class _Vectors:
    """v_t = (1 - p_t) h_t of every token, not written out: the hidden states `[B, T, d]` are read where they lie.

    Each call reads them once: with one refinement `prepare` does so four times, the fewest there can be, since each
    centroid needs every margin and each margin both centroids. Half precision is made full a few sequences at a time.
    """

    def __init__(self, hidden: Tensor, unsure: Tensor) -> None:
        """unsure `[B, T]`: 1 - p_t, 0 where the mask is 0; its dtype is the one computed in."""
        self.hidden, self.unsure = hidden, unsure
        rows = len(hidden) if hidden.dtype == unsure.dtype else PART // hidden.shape[1:].numel()
        self.rows = max(1, rows)

    def sum(self, counts: Tensor) -> Tensor:
        """sum_t counts_t v_t for each side, `[2, d]`; counts `[B, 2, T]`."""
        parts = zip((counts * self.unsure[:, None]).split(self.rows), self._parts(), strict=True)
        return _joined([torch.bmm(of_part, hidden) for of_part, hidden in parts]).sum(dim=0)

    def along(self, direction: Tensor) -> Tensor:
        """v_t . direction, `[B, T]`; direction `[d]`."""
        return _joined([hidden @ direction for hidden in self._parts()]) * self.unsure

    def _parts(self) -> Iterator[Tensor]:
        return (part.to(self.unsure.dtype) for part in self.hidden.split(self.rows))


def _joined(parts: list[Tensor]) -> Tensor:
    return torch.cat(parts) if len(parts) > 1 else parts[0]  # cat copies even one


def _centroids(vectors: _Vectors, counts: Tensor, reduce: Reduce) -> Tensor:
    """Means of the vectors by the weights of either side, `[B, 2, T]`, over all ranks: `[2, d]`."""
    sums = reduce(torch.cat([vectors.sum(counts), counts.sum(dim=(0, 2))[:, None]], dim=1))
    return sums[:, :-1] / sums[:, -1:].clamp(min=TINY)


def _nearness(vectors: _Vectors, centroids: Tensor) -> Tensor:
    """|v - wrong|^2 - |v - right|^2 of each token `[B, T]`: the squares of v cancel. The margin where A > 0, -margin
    where A < 0."""
    right, wrong = centroids
    apart = right - wrong
    return vectors.along(2 * apart) - apart @ (right + wrong)


def _units(nearness: Tensor, sides: Tensor, reduce: Reduce) -> Tensor:
    """`[B, T]`: what makes a token's nearness its margin / sd: 1 / the sd of its side's over all ranks, or -1 / sd."""
    powers = torch.stack([torch.ones_like(nearness), nearness, nearness**2], dim=2)
    sums = reduce(torch.bmm(sides.sign(), powers).sum(dim=0, dtype=torch.float64))  # [2, 3]
    _, mean, square = (sums / sums[:, :1].clamp(min=1)).unbind(dim=1)
    right, wrong = (square - mean**2).clamp(min=TINY).rsqrt().to(nearness.dtype)
    return torch.where(sides[:, 0] > 0, right, -wrong)
