"""SAPO (2511.20347; code: verl, ms-swift): a smooth gate in the place of PPO's clip.

    loss_t = -(4 / tau) sigmoid(tau (r_t - 1)) A        tau = tau_positive where A > 0, tau_negative elsewhere

The surrogate's slope in r is sech^2(tau (r - 1) / 2): 1 at r = 1, falling off on both sides and never quite 0, so no
token is cut off at an edge. Wrong answers fall off faster (tau 1.05): raising all other tokens is the noisier push.
"""

from __future__ import annotations

import torch
from torch import Tensor

from rltk.algorithms.batch import TokenBatch
from rltk.algorithms.objective import Objective
from rltk.algorithms.options import option


class SAPO(Objective):
    """Nothing is clipped: clip_low, clip_high and dual_clip have no effect."""

    tau_positive: float = option(1.0, above=0.0)
    tau_negative: float = option(1.05, above=0.0)

    default_minibatches = 4

    def token_loss(self, batch: TokenBatch) -> tuple[Tensor, dict[str, Tensor]]:
        advantage, ratio = self.token_advantage(batch), self.ratio(batch)
        tau = torch.where(advantage > 0, torch.full_like(ratio, self.tau_positive), self.tau_negative)
        gate = torch.sigmoid(tau * (ratio - 1))
        return -4 / tau * gate * advantage, {"gate/slope": 4 * gate * (1 - gate)}
