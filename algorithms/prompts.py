"""How an objective chooses what is sampled next; the driver applies it, an objective only declares it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class PromptSampler:
    """Weights of prompts by a running mean of their accuracy: `mean <- decay * mean + (1 - decay) * accuracy`.

    Prompts of a finite task are told apart by index, those of an endless one by level.
    """

    start: float = 0.5  # the mean of a prompt that was never sampled
    decay: float = 0.9

    def update(self, mean: float, accuracy: float) -> float:
        return self.decay * mean + (1 - self.decay) * accuracy

    def weights(self, means: Sequence[float]) -> list[float]:
        """Relative weight of each prompt, at least 0; a subclass says which accuracies teach most."""
        raise NotImplementedError(f"{type(self).__name__} does not weight prompts: write weights(means)")
