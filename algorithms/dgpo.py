"""DGPO (2605.03327; notes and third-party code): the sequence's advantage is shared out to its tokens.

    A_t = A |y| softmax_t(s_t / tau)        s_t = H2_t Ent_t^kappa
    loss_t = max(-A_t r_t, -A_t clip(r_t, 1 - clip_low, 1 + clip_high))

H2_t = 1 - sum_v sqrt(new(v) ref(v)) is the squared Hellinger distance to the frozen reference, Ent_t the entropy over
log V, both in [0, 1]: a token counts for more where the policy has moved away *and* is unsure. The weights have mean 1
over each sequence, so its mean advantage stays A; none is more than e^(1/tau) times another. No KL term.
Detaching the weights is ours.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from rltk.algorithms.batch import TokenBatch
from rltk.algorithms.clipping import clipped_loss
from rltk.algorithms.objective import Objective
from rltk.algorithms.options import option


class DGPO(Objective):
    """`tau`: the larger, the more alike the weights (GRPO in the limit). `kappa` 0: the entropy does not count."""

    tau: float = option(0.5, above=0.0)
    kappa: float = option(1.0, low=0.0)

    default_minibatches = 4

    @property
    def needs(self) -> frozenset[str]:
        return super().needs | {"ref", "hellinger", "entropy"}

    def token_loss(self, batch: TokenBatch) -> tuple[Tensor, dict[str, Tensor]]:
        assert batch.hellinger is not None and batch.entropy is not None  # loss has checked `needs`
        weight = self._weight(batch.hellinger, batch.entropy, batch.mask)
        advantage = weight * self.token_advantage(batch)
        ratio, low, high = self.ratio(batch), 1 - self.clip_low, 1 + self.clip_high
        loss, metrics = clipped_loss(ratio, advantage, low, high, self.dual_clip)
        metrics |= {"weight/square": weight**2, "weight/token_max": weight, "hellinger/mean": batch.hellinger}
        return loss, metrics

    def _weight(self, distance: Tensor, entropy: Tensor, mask: Tensor) -> Tensor:
        """|y| softmax_t(s_t / tau) over the masked tokens, `[B, T]`, 0 where the mask is 0; without gradient."""
        # Rounding may leave [0, 1] by a little, and a negative entropy has no power kappa.
        distance, entropy = distance.detach().clamp(0.0, 1.0), entropy.detach().clamp(0.0, 1.0)
        score = (distance * entropy**self.kappa / self.tau).masked_fill(~mask, -math.inf)
        weight = mask.sum(dim=1, keepdim=True) * score.softmax(dim=1)
        return torch.where(mask, weight, 0.0)  # a row without a token is NaN up to here
