"""REINFORCE++ (2501.03262; code: verl): no group baseline; rewards whitened over all sampled tokens of the batch.

    A_i = (R_i - mean) / (sd + eps)        mean and sd over every masked token t, which carries its sequence's R_i

so a long sequence weighs by its length in both. The loss is PPO's clipped token ratio, mean over tokens.
"The batch" is the optimizer step's, over all ranks (verl whitens the whole training step's). The paper's KL penalty
inside the reward is left out; `beta` puts one into the loss.
"""

from __future__ import annotations

import math
from dataclasses import replace

import torch
from torch import Tensor

from rltk.algorithms.advantages import valid_groups
from rltk.algorithms.batch import TokenBatch
from rltk.algorithms.grpo import GRPO
from rltk.algorithms.objective import Reduce
from rltk.algorithms.options import option

# Relative to the mean: a smaller deviation is the rounding of equal rewards, which must give exactly 0.
ROUNDING = 1e-9


class ReinforcePlusPlus(GRPO):
    """`min_group` may be 1: a prompt needs no second sample. `std` False: the mean is subtracted and nothing more."""

    aggregation = "token-mean"
    min_group: int = option(1, low=1)

    def advantages(self, rewards: Tensor, group: Tensor, valid: Tensor) -> Tensor:
        """The rewards themselves: what whitens them needs every sequence's length, and is done in `prepare`."""
        return torch.where(valid_groups(group, valid, self.min_group), rewards, 0.0)

    def prepare(self, shard: TokenBatch, reduce: Reduce | None = None, first: bool = True) -> TokenBatch:
        """Whitens the advantages over the optimizer batch's masked tokens, all ranks together."""
        shard = super().prepare(shard, reduce, first)
        tokens = self.token_advantage(shard)[shard.mask].double()
        sums = torch.stack([tokens.new_tensor(float(tokens.numel())), tokens.sum()])
        count, total = (sums if reduce is None else reduce(sums)).tolist()
        mean = total / max(count, 1.0)
        # A second sum, around the mean: from sum of squares minus mean^2 nothing is left where the spread is small.
        square = ((tokens - mean) ** 2).sum()
        square = float(square if reduce is None else reduce(square))
        deviation = math.sqrt(square / max(count - self.ddof, 1.0))
        whitened = shard.advantage.double() - mean
        if deviation <= ROUNDING * abs(mean):
            whitened = torch.zeros_like(whitened)
        elif self.std:
            whitened = whitened / (deviation + self.eps)
        return replace(shard, advantage=whitened.to(shard.advantage.dtype))
