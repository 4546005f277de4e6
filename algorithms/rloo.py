"""RLOO (2402.14740; code: verl): REINFORCE whose baseline is the mean reward of the prompt's *other* samples.

    A_i = R_i - mean_{j != i} R_j = (R_i - mean) n / (n - 1)        n scored samples of the group

The baseline does not depend on the sample it judges, so it adds no bias. The loss is PPO's clipped token ratio and its
mean over tokens, as verl has it; the paper takes one on-policy step on whole sequences: minibatches=1 and
aggregation=seq-mean-token-sum.
"""

from __future__ import annotations

import torch
from torch import Tensor

from rltk.algorithms.advantages import valid_groups
from rltk.algorithms.grpo import GRPO


class RLOO(GRPO):
    """`std` True would further divide by the group's deviation."""

    std = False
    aggregation = "token-mean"

    def advantages(self, rewards: Tensor, group: Tensor, valid: Tensor) -> Tensor:
        centred = super().advantages(rewards, group, valid)
        _, member = torch.unique(group, return_inverse=True)
        # 0 where the group is dropped (and `centred` is), else at least min_group, which is at least 2: never 1.
        size = torch.bincount(member[valid_groups(group, valid, self.min_group)], minlength=len(group))[member]
        return centred * size / (size - 1)
