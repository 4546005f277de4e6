"""Log-ratios, and what is estimated from them: the distance to a frozen reference, a penalty inside the loss."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor
from torch.nn.functional import hardtanh

KLEstimator = Literal["k1", "k2", "k3"]
LOG_RATIO_LIMIT = 20.0  # exp(20) = 5e8: far beyond any ratio one can learn from, far below overflow


def masked_log_ratio(mask: Tensor, new: Tensor, old: Tensor) -> Tensor:
    """new - old, `[B, T]`, clamped to +-20, 0 where the mask is 0."""
    # hardtanh is a clamp; its backward is one pass over the tokens, that of clamp is four.
    return hardtanh(torch.where(mask, new - old, 0.0), -LOG_RATIO_LIMIT, LOG_RATIO_LIMIT)


def kl_estimate(log_ratio: Tensor, kind: KLEstimator) -> Tensor:
    """Estimate of KL(new || ref) at each sampled token; `log_ratio` = new - ref, clamped by the caller.

    As *values* under samples of `new`, k1 and k3 are unbiased and k2 is close. Their *gradients*, which is what a loss
    uses, differ: k1, the log-ratio, has mean gradient 0 and so restrains nothing on average; k2, half its square, has
    that of the reverse KL(new || ref); k3, exp(-x) + x - 1, has that of the *forward* KL(ref || new).
    """
    if kind == "k1":
        return log_ratio
    if kind == "k2":
        return 0.5 * log_ratio**2
    return torch.expm1(-log_ratio) + log_ratio
