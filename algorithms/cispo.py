"""CISPO (2506.13585; code: verl, TRL): the importance *weight* is clipped, so that no token loses its gradient.

    loss_t = -sg[clip(r_t, 1 - clip_low, 1 + clip_high)] A new_t

PPO's clip drops a token's gradient altogether; here it only counts for less. By default the weight is at most 5 and not
bounded below, as the paper leaves that side open.
"""

from __future__ import annotations

import torch
from torch import Tensor

from rltk.algorithms.batch import TokenBatch
from rltk.algorithms.objective import Objective


class CISPO(Objective):
    """`clip_low` 1: no lower bound. `dual_clip` c bounds the weight by c where A < 0."""

    clip_low = 1.0
    clip_high = 4.0
    aggregation = "token-mean"

    default_minibatches = 4

    def token_loss(self, batch: TokenBatch) -> tuple[Tensor, dict[str, Tensor]]:
        low, high = 1 - self.clip_low, 1 + self.clip_high
        return weighted_loss(batch, self.ratio(batch), self.token_advantage(batch), low, high, self.dual_clip)


def weighted_loss(
    batch: TokenBatch, ratio: Tensor, advantage: Tensor, low: float, high: float, dual: float | None
) -> tuple[Tensor, dict[str, Tensor]]:
    """Per-token loss -sg[clip(ratio, low, high)] A new; with `dual` and A < 0 the weight is at most `dual`. `[B, T]`.

    Also returns the weight, and as `clip/outside` whether the ratio was outside [low, high].
    """
    ratio = ratio.detach()
    weight = ratio.clamp(low, high)
    if dual is not None:
        weight = torch.where(advantage < 0, weight.clamp(max=dual), weight)
    loss = -weight * advantage * torch.where(batch.mask, batch.new, 0.0)
    outside = (ratio < low) | (ratio > high)
    return loss, {"weight/mean": weight, "clip/outside": outside.to(ratio.dtype)}
