"""APO (2506.21655; code: View-R1): GRPO that treats right and wrong answers differently.

    right (A > 0): KL weight 1 - exp(-e (1 - d)), d = 1 - k/n the prompt's difficulty; 1 if d is 0 or 1
    wrong (A < 0): A * (2 - growth^-(n - mean n of the group's right answers)) where n is above that mean

Right answers to hard prompts are the rare ones to learn from, so the reference holds them less; wrong answers keep the
whole KL penalty and are punished up to twice as much for rambling. A group without a right answer has no such mean.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from rltk.algorithms.batch import TokenBatch
from rltk.algorithms.clipping import clipped_loss
from rltk.algorithms.grpo import GRPO
from rltk.algorithms.options import option


class APO(GRPO):
    """`adaptive_kl` False: KL weight 1 for all. `growth` 1: no punishment of length."""

    beta = 1e-3
    adaptive_kl: bool = option(True)
    growth: float = option(1.00001, low=1.0)

    @property
    def needs(self) -> frozenset[str]:
        return super().needs | {"group_length"} | ({"pass_rate"} if self.beta > 0 and self.adaptive_kl else set())

    def token_loss(self, batch: TokenBatch) -> tuple[Tensor, dict[str, Tensor]]:
        weight, ratio = self._length_weight(batch), self.ratio(batch)
        advantage = weight * self.token_advantage(batch)
        loss, metrics = clipped_loss(ratio, advantage, 1 - self.clip_low, 1 + self.clip_high, self.dual_clip)
        return loss, metrics | {"weight/length": weight}

    def penalty(self, batch: TokenBatch) -> tuple[Tensor, dict[str, Tensor]]:
        if not self.adaptive_kl:
            return super().penalty(batch)
        weight, estimate = self._kl_weight(batch), self.kl_to_reference(batch)
        return self.beta * weight * estimate, {"kl/ref": estimate, "weight/kl": weight}

    def _kl_weight(self, batch: TokenBatch) -> Tensor:
        """1 - exp(-e k/n) where A > 0 and 0 < k/n < 1, else 1; `[B, 1]`, or `[B, T]` as the advantage."""
        assert batch.pass_rate is not None  # loss has checked `needs`
        solved = batch.pass_rate[:, None]
        eased = self._advantage(batch) * solved * (1 - solved) > 0
        return torch.where(eased, -torch.expm1(-math.e * solved), 1.0)

    def _length_weight(self, batch: TokenBatch) -> Tensor:
        """2 - growth^-excess, in [1, 2), where A < 0, else 1; `[B, 1]`, or `[B, T]` as the advantage."""
        assert batch.group_length is not None
        excess = (batch.masked_lengths - batch.group_length)[:, None].clamp(min=0.0)
        return torch.where(self._advantage(batch) < 0, 1 - torch.expm1(-math.log(self.growth) * excess), 1.0)

    def _advantage(self, batch: TokenBatch) -> Tensor:
        """A as it was given: `[B, 1]`, or `[B, T]` where every token has its own."""
        return batch.advantage[:, None] if batch.advantage.ndim == 1 else self.token_advantage(batch)
