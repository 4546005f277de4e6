"""FG-ExPO (2605.11403; paper): GRPO whose KL penalty and choice of prompts follow the policy's accuracy.

    beta_eff = beta (tanh(acc) + 1) / 2        acc: mean verifier score (0 or 1) of the batch's samples
    prompts are drawn by exp(-(p - .5)^2 / (2 width^2)), p a running mean of the prompt's accuracy, .9 of it kept

The reference holds a failing policy less (.5 beta) than a successful one (.88 beta), and the prompts are those solved
about half of the time. A circulating beta (1 - acc)^2 has the wrong direction. The paper's batch is the training
step's; here acc is the optimizer batch's, over all ranks, so minibatches differ in it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from rltk.algorithms.batch import TokenBatch, Totals
from rltk.algorithms.grpo import GRPO
from rltk.algorithms.objective import Reduce
from rltk.algorithms.options import option
from rltk.algorithms.prompts import PromptSampler


@dataclass(frozen=True)
class GaussianCurriculum(PromptSampler):
    """Prompts weigh by how near their accuracy is to one half."""

    width: float = 0.35

    def weights(self, means: Sequence[float]) -> list[float]:
        return [math.exp(-((mean - 0.5) ** 2) / (2 * self.width**2)) for mean in means]


class FGExPO(GRPO):
    """`curriculum_width`: the standard deviation of the Gaussian, in accuracy."""

    beta = 0.02
    ddof = 0
    curriculum_width: float = option(0.35, above=0.0)

    _accuracy: float | None = None  # of the optimizer batch, all ranks

    @property
    def needs(self) -> frozenset[str]:
        return super().needs | ({"pass_rate"} if self.beta > 0 else set())

    def prompt_sampler(self) -> PromptSampler:
        return GaussianCurriculum(width=self.curriculum_width)

    def prepare(self, shard: TokenBatch, reduce: Reduce | None = None, first: bool = True) -> TokenBatch:
        """Measures acc: the mean over sequences of their group's share of right answers."""
        shard = super().prepare(shard, reduce, first)
        if self.beta > 0:
            if shard.pass_rate is None:
                raise ValueError(f"{self!r} needs pass_rate in the batch, but it is None")
            counted = shard.mask.any(dim=1)
            rates = torch.where(counted, shard.pass_rate, 0.0)
            sums = torch.stack([rates, counted]).double().sum(dim=1)
            total, count = (sums if reduce is None else reduce(sums)).tolist()
            self._accuracy = total / max(count, 1.0)
        return shard

    def loss(self, batch: TokenBatch, totals: Totals | None = None) -> tuple[Tensor, dict[str, Tensor]]:
        if totals is None:  # the batch is all there is
            batch = self.prepare(batch)
        return super().loss(batch, totals)

    def penalty(self, batch: TokenBatch) -> tuple[Tensor, dict[str, Tensor]]:
        if self._accuracy is None:
            raise ValueError("fg_expo: call prepare with the optimizer batch before the losses of its micro-batches")
        beta = self.beta * (math.tanh(self._accuracy) + 1) / 2
        estimate = self.kl_to_reference(batch)
        return beta * estimate, {"kl/ref": estimate, "kl/beta": estimate.new_full((len(estimate),), beta)}
