"""H2O (arXiv 2306.14048): the tokens that have received most attention so far, and the newest ones."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rltk.errors import ConfigError
from rltk.rollout.kv.policies.policy import Policy, PromptScores

if TYPE_CHECKING:
    from torch import Tensor


class H2O(Policy):
    """recent: share of the slots after the sinks that the newest tokens hold (the paper: half)."""

    mode = "h2o"

    def __init__(self, recent: float = 0.5) -> None:
        if not 0 < recent < 1:
            raise ConfigError(f"kv.recent={recent!r} must be a share between 0 and 1")
        self.recent = recent

    def window(self, keep: int, sinks: int) -> int:
        return max(1, int(self.recent * (keep - sinks)))

    def scores(self, query: Tensor, key: Tensor, prompt: int, scale: float, prompt_scores: PromptScores) -> Tensor:
        """Summed over every query of the prompt: decoding goes on adding to it."""
        return prompt_scores(query[:, :prompt], key[:, :prompt], scale, "sum")
