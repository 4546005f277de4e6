"""GRPO (2402.03300): PPO's clipped token ratio with the group's advantage in place of a critic.

    r_t = exp(new_t - old_t)        loss_t = max(-A r_t, -A clip(r_t, 1 - clip_low, 1 + clip_high))

Choices of ours: no KL penalty and no dual clip unless asked for (verl's silent dual clip at 3 changes the method).
"""

from __future__ import annotations

from torch import Tensor

from rltk.algorithms.batch import TokenBatch
from rltk.algorithms.clipping import clipped_loss
from rltk.algorithms.objective import Objective


class GRPO(Objective):
    """Options: those of `Objective`, with its defaults. `dual_clip` c > 1 bounds the loss by -A c where A < 0."""

    default_minibatches = 4

    def token_loss(self, batch: TokenBatch) -> tuple[Tensor, dict[str, Tensor]]:
        advantage = self.token_advantage(batch)
        return clipped_loss(self.ratio(batch), advantage, 1 - self.clip_low, 1 + self.clip_high, self.dual_clip)
