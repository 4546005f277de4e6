"""DAPO (2503.14476; code: verl's recipe): GRPO that clips higher, averages over tokens and refills useless groups.

    loss_t = max(-A r_t, -A clip(r_t, 1 - clip_low, 1 + clip_high)), mean over all tokens of the batch
    R      = task's reward + min(-(n - (max_length - overlong_buffer)) / overlong_buffer, 0)       n sampled tokens

A group whose rewards are all equal teaches nothing: it is refused, and another prompt is sampled in its place. That is
judged before the length penalty, which alone would tell an all-right group's samples apart by their length.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from rltk.algorithms.batch import TokenBatch
from rltk.algorithms.grpo import GRPO
from rltk.algorithms.objective import Sample
from rltk.algorithms.options import option
from rltk.algorithms.overlong import add_overlong_penalty, overlong_metrics


class DAPO(GRPO):
    """`max_length`: the longest response that may be sampled, in tokens; the defaults of both lengths are the paper's.

    A run's configuration sets max_length to its own task.max_response_tokens. `overlong_buffer` 0, or not smaller than
    max_length: no length penalty. The release rewards with 1 and -1, so a penalty of -1 weighs twice as much on a task
    that rewards with 1 and 0. `dynamic_sampling` False: every group is admitted.
    """

    clip_high = 0.28
    dual_clip = 10.0
    aggregation = "token-mean"
    max_length: int = option(20480, low=1)
    overlong_buffer: int = option(4096, low=0)
    dynamic_sampling: bool = option(True)

    def shape_rewards(self, group: Sequence[Sample]) -> list[float | None]:
        rewards = super().shape_rewards(group)
        return add_overlong_penalty(rewards, group, self.max_length, self.overlong_buffer)

    def admit(self, group: Sequence[Sample]) -> bool:
        """Refuses a group with one reward for all its scored samples, or fewer of those than `min_group`."""
        rewards = [reward for reward in super().shape_rewards(group) if reward is not None]
        return not self.dynamic_sampling or (len(rewards) >= self.min_group and min(rewards) < max(rewards))

    def token_loss(self, batch: TokenBatch) -> tuple[Tensor, dict[str, Tensor]]:
        loss, metrics = super().token_loss(batch)
        return loss, metrics | overlong_metrics(batch, self.max_length, self.overlong_buffer)
