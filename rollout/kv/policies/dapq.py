"""DapQ (arXiv 2603.11564): pseudo tokens at the positions that come next rank the prompt's keys.

Position, not content, makes a query: tokens of any content behind the prompt ask what the response will ask. Their keys
and values are dropped at once, and decoding begins at the prompt's length as if they had never been there.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from rltk.rollout.kv.policies.policy import Policy, PromptScores, whole

if TYPE_CHECKING:
    from torch import Tensor


class DapQ(Policy):
    """pseudo: how many of them (the paper: 32 to 64)."""

    def __init__(self, pseudo: int = 32) -> None:
        self.pseudo = whole("pseudo", pseudo, 1)

    def scores(self, query: Tensor, key: Tensor, prompt: int, scale: float, prompt_scores: PromptScores) -> Tensor:
        if query.shape[1] == prompt:  # the weight probe's prompts come without, and nothing is decoded after them
            return query.new_zeros(len(key), key.shape[2], prompt).float()
        return prompt_scores(query[:, prompt:], key, scale)[..., :prompt]
