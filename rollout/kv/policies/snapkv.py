"""SnapKV (arXiv 2404.14469): the prompt's last tokens say which of the others matter."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rltk.errors import ConfigError
from rltk.rollout.kv.policies.policy import Policy, PromptScores, whole

if TYPE_CHECKING:
    from torch import Tensor


class SnapKV(Policy):
    """Attention of the last `window` queries, averaged, then over `pool` neighbouring keys; the window itself stays."""

    def __init__(self, window: int = 32, pool: int = 5) -> None:
        self.observers, self.pool = whole("window", window, 1), whole("pool", pool, 1)
        if pool % 2 == 0:
            raise ConfigError(f"kv.pool={pool} must be odd: it is centred on a key")

    def window(self, keep: int, sinks: int) -> int:
        return self.observers

    def scores(self, query: Tensor, key: Tensor, prompt: int, scale: float, prompt_scores: PromptScores) -> Tensor:
        from torch.nn.functional import avg_pool1d

        window = min(self.observers, prompt)
        scores = prompt_scores(query[:, prompt - window : prompt], key[:, :prompt], scale)
        before = scores[..., : prompt - window]  # the window is not pooled into: it stays in any case
        if before.shape[2]:
            scores[..., : prompt - window] = avg_pool1d(before, self.pool, 1, self.pool // 2)
        return scores
