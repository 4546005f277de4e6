"""MinPRO (2601.22718; notes, aggregation derived): the token's ratio times the smallest ratio before it.

    q_t = r_t sg[min_{s<t} r_s]        the minimum over the sampled tokens before t, 1 if there are none
    form=product: loss_t = max(-A q_t, -A clip(q_t, 1 - clip_low, 1 + clip_high))
    form=cispo:   loss_t = -sg[clip(q_t, 1 - clip_low, 1 + clip_high)] A new_t

The exact weight of token t is the cumulative ratio of its prefix, whose variance grows with every token. One factor
stands for the prefix instead: the token that the policy has moved away from most. Tool output is transparent.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor

from rltk.algorithms.batch import TokenBatch
from rltk.algorithms.cispo import weighted_loss
from rltk.algorithms.clipping import clipped_loss
from rltk.algorithms.kl import LOG_RATIO_LIMIT
from rltk.algorithms.objective import Objective
from rltk.algorithms.options import option


class MinPRO(Objective):
    """`form`: the clipped product, or the CISPO-like variant in which a clipped token keeps its gradient."""

    clip_high = 0.28
    aggregation = "token-mean"
    form: Literal["product", "cispo"] = option("product", choices=("product", "cispo"))

    default_minibatches = 4

    def token_loss(self, batch: TokenBatch) -> tuple[Tensor, dict[str, Tensor]]:
        log_ratio, advantage = self.log_ratio(batch), self.token_advantage(batch)
        prefix = prefix_minimum(log_ratio.detach(), batch.mask)
        product = (log_ratio + prefix).clamp(-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT).exp()
        low, high = 1 - self.clip_low, 1 + self.clip_high
        if self.form == "cispo":
            loss, metrics = weighted_loss(batch, product, advantage, low, high, self.dual_clip)
        else:
            loss, metrics = clipped_loss(product, advantage, low, high, self.dual_clip)
        return loss, metrics | {"log_prefix/mean": prefix}


def prefix_minimum(values: Tensor, mask: Tensor) -> Tensor:
    """min_{s<t} values_s over the masked tokens before t, 0 where there are none; `[B, T]`."""
    so_far = values.masked_fill(~mask, math.inf).cummin(dim=1).values
    before = torch.nn.functional.pad(so_far[:, :-1], (1, 0), value=math.inf)
    return torch.where(before.isinf(), 0.0, before)
