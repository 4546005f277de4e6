"""StreamingLLM (arXiv 2309.17453): the first tokens and the newest ones."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rltk.rollout.kv.policies.policy import Policy, PromptScores

if TYPE_CHECKING:
    from torch import Tensor


class Streaming(Policy):
    mode = "ring"

    def window(self, keep: int, sinks: int) -> int:
        return keep - sinks

    def scores(self, query: Tensor, key: Tensor, prompt: int, scale: float, prompt_scores: PromptScores) -> Tensor:
        return key.new_zeros(len(key), key.shape[2], prompt).float()
