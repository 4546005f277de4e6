"""CTPO (2605.07331): the cumulative ratio of the prefix, clipped in a window that widens with position.

    S_t = sum_{s<=t} m_s l_s        rho_t = exp(sg[S_t] + new_t - sg[new_t])        p_t = masked tokens up to t
    loss_t = max(-A rho_t, -A clip(rho_t, exp(-clip_low p_t^a), exp(clip_high p_t^a)))
    A < 0: loss_t is at most -A exp(dual_clip p_t^a)

rho_t is the importance ratio of everything up to and including token t; its gradient flows through token t alone.
The window grows as sqrt(t) (a = .5) because l_t is nearly a martingale difference: sd(S_t) = sigma sqrt(t).
Tokens outside the loss mask (tool output) are transparent: they add nothing to S and do not advance p.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from rltk.algorithms.batch import TokenBatch
from rltk.algorithms.clipping import clipped_loss
from rltk.algorithms.objective import Objective, Reduce
from rltk.algorithms.options import option

# sd of a token's log-ratio that the default window is made for: 7-12 % of tokens clipped at any position.
WINDOW_SD = 0.017
# exp(60) = 1e26: sums of many such tokens still fit fp32, and no window worth having is as wide.
LOG_RHO_LIMIT = 60.0


class CTPO(Objective):
    """Clip widths are in log space, at the first token; with reference=mu they grow by max(1, sd(old - mu) / .017).

    `position_power` is a: 0 a fixed window, .5 the paper's. `dual_clip` None turns that bound off.
    """

    clip_low: float = option(0.025, low=0.0)
    clip_high: float = option(0.05, low=0.0)
    dual_clip: float | None = option(0.05, low=0.0, optional=True)
    position_power: float = option(0.5, low=0.0, high=1.0)

    default_minibatches = 4

    _window_sd: float | None = None  # sd(old - mu) over the step's first minibatch, all ranks; only with reference=mu

    def prepare(self, shard: TokenBatch, reduce: Reduce | None = None, first: bool = True) -> TokenBatch:
        """With reference=mu: measures sd(old - mu) on the first minibatch of a training step and holds it for the step.

        `shard.old` is then the detached `new` of that minibatch, computed with the weights the step starts from.
        """
        shard = super().prepare(shard, reduce, first)
        if self.reference == "mu" and first:
            gap = (shard.old - shard.mu)[shard.mask].double()
            sums = torch.stack([gap.new_tensor(float(gap.numel())), gap.sum(), (gap**2).sum()])
            count, total, square = (sums if reduce is None else reduce(sums)).tolist()
            if count < 1 or not math.isfinite(square):
                raise ValueError(f"ctpo with reference=mu: sd(old - mu) of {count:g} tokens, sum of squares {square}")
            self._window_sd = max(0.0, square / count - (total / count) ** 2) ** 0.5
        return shard

    def token_loss(self, batch: TokenBatch) -> tuple[Tensor, dict[str, Tensor]]:
        scale = self._window_scale()
        width = batch.mask.cumsum(dim=1, dtype=batch.new.dtype) ** self.position_power
        high = scale * self.clip_high * width
        log_rho = self._log_rho(batch, high)
        low, high = (-scale * self.clip_low * width).exp(), high.exp()
        dual = None if self.dual_clip is None else (scale * self.dual_clip * width).exp()

        loss, metrics = clipped_loss(log_rho.exp(), self.token_advantage(batch), low, high, dual)
        metrics |= {"log_rho/mean": log_rho, "log_rho/square": log_rho.detach() ** 2}
        if self.reference == "mu":
            metrics |= {"window/scale": width.new_full((len(width),), scale)}
        return loss, metrics

    def _log_rho(self, batch: TokenBatch, high: Tensor) -> Tensor:
        """log rho_t `[B, T]`, whose gradient flows through token t alone. high `[B, T]`: the window's upper edge."""
        log_rho = self.log_ratio(batch).detach().cumsum(dim=1)
        # exp would overflow. The ceiling lies above the window; a token beyond it has no gradient, as in the release.
        ceiling = (high + 1.0).clamp(min=10.0, max=LOG_RHO_LIMIT)
        current = torch.where(batch.mask & (log_rho <= ceiling), batch.new, 0.0)
        return log_rho.clamp(max=ceiling) + (current - current.detach())

    def _window_scale(self) -> float:
        if self.reference == "old":
            return 1.0
        if self._window_sd is None:
            raise ValueError("ctpo with reference=mu: call prepare with the step's first minibatch before loss")
        return max(1.0, self._window_sd / WINDOW_SD)
