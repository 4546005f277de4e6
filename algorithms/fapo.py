"""FAPO (2510.22543; code: verl's recipe): a right answer reached by a wrong step is worth less than a sound one.

    R = 1 (right and sound), 1 - flaw_penalty (right but flawed), -1 (wrong); plus DAPO's length penalty
    loss_t = max(-A r_t, -A clip(r_t, 1 - clip_low, 1 + clip_high)), mean over all tokens of the batch

Early on, flawed answers are better than the group's mean and pull the policy towards right ones; once sound answers are
more than 2 / flaw_penalty - 1 times as many as wrong ones (as many, by default), their advantage turns negative.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from rltk.algorithms.batch import TokenBatch
from rltk.algorithms.grpo import GRPO
from rltk.algorithms.objective import Sample, Scored
from rltk.algorithms.options import option
from rltk.algorithms.overlong import add_overlong_penalty, overlong_metrics


class FAPO(GRPO):
    """`flaw_penalty` is the paper's lambda: 0 is GRPO, 2 makes a flawed answer as bad as a wrong one.

    The label is the reward record's: `flawed` True, False, or None where nobody checked, which counts as sound.
    `max_length` and `overlong_buffer` as in `DAPO` (defaults: the release's).
    """

    clip_high = 0.28
    dual_clip = 10.0
    aggregation = "token-mean"
    flaw_penalty: float = option(1.0, low=0.0, high=2.0)
    max_length: int = option(8192, low=1)
    overlong_buffer: int = option(4096, low=0)

    def shape_rewards(self, group: Sequence[Sample]) -> list[float | None]:
        """The rewards of the head of this file; ValueError if a scored sample does not say whether it is correct."""
        rewards = [None if s.reward is None or s.reward.value is None else self._reward(s.reward) for s in group]
        return add_overlong_penalty(rewards, group, self.max_length, self.overlong_buffer)

    def _reward(self, reward: Scored) -> float:
        if reward.correct is None:
            raise ValueError(
                f"fapo: a sample with reward {reward.value} does not say whether its answer is correct; "
                f"set `correct` in the RewardRecord, or return a plain number (1.0 and above is correct)"
            )
        if not reward.correct:
            return -1.0
        return 1.0 - self.flaw_penalty if reward.flawed else 1.0

    def token_loss(self, batch: TokenBatch) -> tuple[Tensor, dict[str, Tensor]]:
        loss, metrics = super().token_loss(batch)
        return loss, metrics | overlong_metrics(batch, self.max_length, self.overlong_buffer)
