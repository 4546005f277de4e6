"""The clipped surrogate that most objectives share (PPO, 1707.06347; dual clip 1912.09729)."""

from __future__ import annotations

import torch
from torch import Tensor


def clipped_loss(
    ratio: Tensor, advantage: Tensor, low: Tensor | float, high: Tensor | float, dual: Tensor | float | None
) -> tuple[Tensor, dict[str, Tensor]]:
    """Per-token loss max(-A r, -A clip(r, low, high)); with `dual` and A < 0, min(that, -A dual).

    All `[B, T]` (bounds may be numbers). Also returns, per token, which bound took its gradient: `clip/high` (A > 0,
    ratio above), `clip/low` (A < 0, ratio below), `clip/dual` (A < 0, ratio above `dual`), `clip/share` any of these,
    and `clip/outside`, the ratio being outside [low, high] whatever the advantage.
    """
    up, down = advantage > 0, advantage < 0
    above, below = ratio > high, ratio < low
    loss = torch.maximum(-advantage * ratio, -advantage * torch.clamp(ratio, low, high))  # pyright: ignore
    beyond = torch.zeros_like(above)
    if dual is not None:
        loss = torch.where(down, torch.minimum(loss, -advantage * dual), loss)
        beyond = down & (ratio > dual)
    flags = {"high": up & above, "low": down & below, "dual": beyond}
    flags |= {"share": flags["high"] | flags["low"] | beyond, "outside": above | below}
    return loss, {f"clip/{name}": flag.to(ratio.dtype) for name, flag in flags.items()}
