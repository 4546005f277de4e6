"""MiniRL (2512.01374; paper): REINFORCE, weighted against the sampler, with PPO's clip as a mask.

    loss_t = -M_t sg[min(exp(new_t - mu_t), cap)] A new_t        A = R - mean
    M_t    = 0 where A > 0 and r_t > 1 + clip_high, or A < 0 and r_t < 1 - clip_low, else 1

r = new/old only decides what is masked; the weight is the whole ratio to the policy that sampled, so the gradient is
the first-order approximation of that of the expected reward. The sum over a response's tokens is not divided by its
length: that would break the approximation. The cap of 5 on the weight is the paper's setting, not its formula.
"""

from __future__ import annotations

import torch
from torch import Tensor

from rltk.algorithms.batch import TokenBatch
from rltk.algorithms.kl import masked_log_ratio
from rltk.algorithms.objective import Objective
from rltk.algorithms.options import option


class MiniRL(Objective):
    """`cap` null: the weight is not truncated. `dual_clip` has no effect."""

    clip_high = 0.27
    std = False
    aggregation = "seq-mean-token-sum"
    cap: float | None = option(5.0, low=1.0, optional=True)

    default_minibatches = 4
    refuses_corrections = "its weight exp(new - mu) already corrects against the sampler"

    def token_loss(self, batch: TokenBatch) -> tuple[Tensor, dict[str, Tensor]]:
        advantage, ratio = self.token_advantage(batch), self.ratio(batch).detach()
        too_high = (advantage > 0) & (ratio > 1 + self.clip_high)
        too_low = (advantage < 0) & (ratio < 1 - self.clip_low)

        new = torch.where(batch.mask, batch.new, 0.0)
        weight = masked_log_ratio(batch.mask, batch.new.detach(), batch.mu).exp()
        truncated = torch.zeros_like(too_high) if self.cap is None else weight > self.cap
        weight = weight.clamp(max=self.cap or torch.inf)

        loss = -weight * advantage * new
        flags = {"high": too_high, "low": too_low, "share": too_high | too_low, "weight": truncated}
        metrics = {f"clip/{name}": flag.to(ratio.dtype) for name, flag in flags.items()}
        return torch.where(too_high | too_low, 0.0, loss), metrics | {"weight/mean": weight}
