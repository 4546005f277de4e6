"""Per-token estimates of the distance to a frozen reference, used as a penalty inside the loss."""

from __future__ import annotations

from typing import Literal

from torch import Tensor

KLEstimator = Literal["k1", "k2", "k3"]
LOG_RATIO_LIMIT = 20.0  # exp(20) = 5e8: far beyond any ratio one can learn from, far below overflow


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
    return (-log_ratio).exp() + log_ratio - 1.0
