"""DHPO (2601.05607; form derived from its abstract): GRPO's token ratio and GSPO's sequence ratio, mixed.

    s_t    = sg[s] r_t / sg[r_t]        s = exp(mean_t l_t)
    loss_t = w max(-A r_t, -A clip(r_t, 1 -+ clip)) + (1 - w) max(-A s_t, -A clip(s_t, 1 -+ sequence_clip))

Each ratio is clipped in a region of its own before they are mixed, so an outlier of one takes only its own share of the
gradient. w = 1 is GRPO, w = 0 is GSPO in its token form. The mixture of two clipped losses is our reading of
"branch-specific clipping"; a second-hand note has the paper rescale entropies by minimum and maximum (entropy-minmax).
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from rltk.algorithms.batch import TokenBatch
from rltk.algorithms.clipping import clipped_loss
from rltk.algorithms.objective import Objective
from rltk.algorithms.options import option


class DHPO(Objective):
    """`mixing` says what w is: `token_weight` (constant), the token's entropy over log V (entropy), or that rescaled to
    [0, 1] between the least and the most of its sequence (entropy-minmax). `dual_clip` bounds both ratios where A < 0.
    """

    clip_high = 0.28
    sequence_clip_low: float = option(3e-4, low=0.0, high=1.0)
    sequence_clip_high: float = option(4e-4, low=0.0)
    mixing: Literal["constant", "entropy", "entropy-minmax"] = option(
        "constant", choices=("constant", "entropy", "entropy-minmax")
    )
    token_weight: float = option(0.5, low=0.0, high=1.0)

    default_minibatches = 4

    @property
    def needs(self) -> frozenset[str]:
        return super().needs | ({"entropy"} if self.mixing != "constant" else set())

    def token_loss(self, batch: TokenBatch) -> tuple[Tensor, dict[str, Tensor]]:
        advantage, log_ratio = self.token_advantage(batch), self.log_ratio(batch)
        length = batch.masked_lengths[:, None].clamp(min=1)
        s = (log_ratio.detach().sum(dim=1, keepdim=True) / length).exp()

        low, high = 1 - self.clip_low, 1 + self.clip_high
        of_token, metrics = clipped_loss(log_ratio.exp(), advantage, low, high, self.dual_clip)
        # s and, as a rule, the advantage are one number for the whole sequence; the gradient of s_t comes after.
        own = batch.advantage[:, None] if batch.advantage.ndim == 1 else advantage
        low, high = 1 - self.sequence_clip_low, 1 + self.sequence_clip_high
        of_sequence, of_s = clipped_loss(s, own, low, high, self.dual_clip)
        clipped, current = of_s["clip/share"], torch.where(batch.mask, batch.new, 0.0)
        of_sequence = of_sequence - own * s * (1 - clipped) * (current - current.detach())

        w = self._token_weight(batch)
        metrics |= {"clip/sequence_share": clipped.expand_as(advantage), "weight/token": w.expand_as(advantage)}
        return w * of_token + (1 - w) * of_sequence, metrics

    def _token_weight(self, batch: TokenBatch) -> Tensor:
        """w in [0, 1], one number or `[B, T]`, without gradient."""
        if self.mixing == "constant":
            return batch.old.new_full((1, 1), self.token_weight)
        assert batch.entropy is not None  # loss has checked `needs`
        entropy = torch.where(batch.mask, batch.entropy.detach(), 0.0)
        if self.mixing == "entropy":
            return entropy
        most = entropy.amax(dim=1, keepdim=True)
        least = torch.where(batch.mask, entropy, torch.inf).amin(dim=1, keepdim=True)
        spread = most - least
        # One entropy for all tokens says nothing: both ratios count alike. A row of padding has spread -inf.
        return torch.where(spread > 0, (entropy - least) / spread, 0.5)
