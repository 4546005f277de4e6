"""APO (2506.21655; code: View-R1): GRPO that treats right and wrong answers differently.

    right (A > 0): KL weight 1 - exp(-e (1 - d)), d = 1 - k/n the prompt's difficulty; 1 if d is 0 or 1
    wrong (A < 0): A * (2 - growth^-(n - mean n of the group's right answers)) where n is above that mean

Right answers to hard prompts are the rare ones to learn from, so the reference holds them less; wrong answers keep the
whole KL penalty and are punished up to twice as much for rambling. A group without a right answer has no such mean.
"""

from __future__ import annotations

import math
from dataclasses import replace

import torch
from torch import Tensor

from rltk.algorithms.batch import TokenBatch
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

    def token_advantage(self, batch: TokenBatch) -> Tensor:
        advantage, factor = batch.advantage, self._length_factor(batch)
        factor = factor if advantage.ndim == 1 else factor[:, None]
        shaped = torch.where(advantage < 0, advantage * factor, advantage)
        return super().token_advantage(replace(batch, advantage=shaped))

    def token_loss(self, batch: TokenBatch) -> tuple[Tensor, dict[str, Tensor]]:
        loss, metrics = super().token_loss(batch)
        least = batch.advantage if batch.advantage.ndim == 1 else super().token_advantage(batch).amin(dim=1)
        return loss, metrics | {"weight/length": torch.where(least < 0, self._length_factor(batch), 1.0)}

    def penalty(self, batch: TokenBatch) -> tuple[Tensor, dict[str, Tensor]]:
        values, metrics = super().penalty(batch)
        if not self.adaptive_kl:
            return values, metrics
        assert batch.pass_rate is not None  # loss has checked `needs`
        solved = batch.pass_rate[:, None]  # 1 - d
        advantage = batch.advantage if batch.advantage.ndim == 2 else batch.advantage[:, None]
        eased = (advantage > 0) & (solved > 0) & (solved < 1)
        weight = torch.where(eased, -torch.expm1(-math.e * solved), 1.0)
        return weight * values, metrics | {"weight/kl": weight.expand_as(values)}

    def _length_factor(self, batch: TokenBatch) -> Tensor:
        """2 - growth^-excess `[B]`, in [1, 2): what a wrong answer of this length counts for."""
        assert batch.group_length is not None
        excess = (batch.mask.sum(dim=1) - batch.group_length).clamp(min=0.0)
        return 1 - torch.expm1(-excess * math.log(self.growth))
