"""GSPO (2507.18071; code: verl): one ratio for the whole sequence, clipped as a whole.

    s = exp(mean_t l_t)                        the geometric mean of the token ratios
    form=sequence: loss_t = max(-A s, -A clip(s, 1 - clip_low, 1 + clip_high)), the same for every token
    form=token:    the same with s_t = sg[s] r_t / sg[r_t] in place of s

Both have the same value and gradient while all tokens share A; the token form takes an advantage for each token.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from rltk.algorithms.batch import TokenBatch
from rltk.algorithms.clipping import clipped_loss
from rltk.algorithms.objective import Objective
from rltk.algorithms.options import option


class GSPO(Objective):
    """The clip range is that of s, which is far closer to 1 than any token's ratio."""

    clip_low = 3e-4
    clip_high = 4e-4
    form: Literal["sequence", "token"] = option("sequence", choices=("sequence", "token"))

    default_minibatches = 4

    def token_loss(self, batch: TokenBatch) -> tuple[Tensor, dict[str, Tensor]]:
        length = batch.masked_lengths[:, None].clamp(min=1)
        log_s = self.log_ratio(batch).detach().sum(dim=1, keepdim=True) / length
        current = torch.where(batch.mask, batch.new, 0.0)
        flow = current - current.detach()  # zero; carries the gradient
        if self.form == "sequence":
            flow = (flow.sum(dim=1, keepdim=True) / length).expand_as(current)
        ratio = (log_s + flow).exp()
        loss, metrics = clipped_loss(
            ratio, self.token_advantage(batch), 1 - self.clip_low, 1 + self.clip_high, self.dual_clip
        )
        return loss, metrics | {"log_s/mean": log_s[:, 0], "log_s/square": log_s[:, 0] ** 2}
