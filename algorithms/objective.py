"""Base of objectives: everything that is not the method itself.

    rewards --shape_rewards--> advantages [B] --prepare--> shard --micro-batches--> loss

    loss = aggregate(correction weight * token_loss + KL penalty)      token_loss is the method

An objective is one file: a subclass with its own defaults and a `token_loss`, and where it needs them the other hooks.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, ClassVar, Literal, Protocol

import torch
from torch import Tensor

from rltk.algorithms.advantages import group_advantages
from rltk.algorithms.aggregation import AGGREGATIONS, Aggregation, divisor
from rltk.algorithms.batch import TokenBatch, Totals
from rltk.algorithms.corrections.correction import Correction
from rltk.algorithms.corrections.none import NoCorrection
from rltk.algorithms.kl import KLEstimator, kl_estimate, masked_log_ratio
from rltk.algorithms.options import Configurable, option
from rltk.algorithms.prompts import PromptSampler

Reduce = Callable[[Tensor], Tensor]


class Scored(Protocol):
    """What `shape_rewards` reads of a reward record (`rltk.trajectory.RewardRecord` has it)."""

    @property
    def value(self) -> float | None: ...
    @property
    def correct(self) -> bool | None: ...
    @property
    def flawed(self) -> bool | None: ...


class Sample(Protocol):
    """What `shape_rewards` reads of a sample (`rltk.trajectory.Trajectory` has it). `length`: sampled tokens."""

    @property
    def reward(self) -> Scored | None: ...
    @property
    def length(self) -> int: ...


class Objective(Configurable):
    """Options shared by every objective; conf/algorithm/<name>.yaml carries the same names and defaults."""

    clip_low: float = option(0.2, low=0.0, high=1.0)
    clip_high: float = option(0.2, low=0.0)
    dual_clip: float | None = option(None, kind=float, above=1.0)
    beta: float = option(0.0, low=0.0)
    kl: KLEstimator = option("k3", choices=("k1", "k2", "k3"))
    std: bool = option(True)
    ddof: int = option(1, choices=(0, 1))
    eps: float = option(1e-6, low=0.0)
    min_group: int = option(2, low=2)
    aggregation: Aggregation = option("seq-mean-token-mean", choices=AGGREGATIONS)
    reference: Literal["old", "mu"] = option("old", choices=("old", "mu"))

    default_minibatches: ClassVar[int] = 1  # with one and reference=old every ratio is 1: a ratio method wants more
    refuses_corrections: ClassVar[str] = ""  # why the method takes no correction; "": it takes any

    def __init__(self, *, correction: Correction | None = None, **values: Any) -> None:
        super().__init__(**values)
        if correction is not None and not isinstance(correction, Correction):
            raise ValueError(f"correction is {correction!r}; pass what build_correction returns, or None")
        self.correction = NoCorrection() if correction is None else correction
        if self.refuses_corrections and not isinstance(self.correction, NoCorrection):
            raise ValueError(
                f"{type(self).__name__} refuses correction={type(self.correction).__name__}: "
                f"{self.refuses_corrections}; use correction=none"
            )
        if self.reference == "mu" and not isinstance(self.correction, NoCorrection):
            raise ValueError(
                f"reference=mu takes the ratio against the sampler itself; correction={type(self.correction).__name__} "
                f"would correct twice: use correction=none or reference=old"
            )

    # -- hooks: a method overrides what it changes -------------------------------------------------------------------

    @property
    def needs(self) -> frozenset[str]:
        """Optional fields of `TokenBatch` that `prepare` and `loss` read; the learner computes no others."""
        return frozenset({"ref"} if self.beta > 0 else ())

    def shape_rewards(self, group: Sequence[Sample]) -> list[float | None]:
        """Rewards of one prompt's samples, in order; None: nobody could tell, the sample is masked."""
        return [None if sample.reward is None else sample.reward.value for sample in group]

    def admit(self, group: Sequence[Sample]) -> bool:
        """Whether a scored group joins the batch; False: it is dropped, and another prompt is sampled in its place."""
        return True

    def prompt_sampler(self) -> PromptSampler | None:
        """How prompts are chosen; None: in the task's order."""
        return None

    def advantages(self, rewards: Tensor, group: Tensor, valid: Tensor) -> Tensor:
        """Advantage of each sample `[B]` from rewards `[B]`, group `[B]` integers, valid `[B]` bool; whole groups.

        Samples outside `valid_groups(group, valid, self.min_group)` get 0; the caller drops them from the batch.
        """
        return group_advantages(
            rewards, group, valid, std=self.std, ddof=self.ddof, eps=self.eps, min_group=self.min_group
        )

    def prepare(self, shard: TokenBatch, reduce: Reduce | None = None, first: bool = True) -> TokenBatch:
        """Once per optimizer batch, before its losses: what needs the whole batch over all ranks.

        shard: this rank's part; its `new` need not be current and is not read. reduce: sums a tensor over ranks (called
        equally often on every rank); None: this rank is all there is. first: the batch is the first minibatch of its
        training step; what is held for the step is computed then. Returns the shard to cut into micro-batches.
        """
        self.correction.prepare(shard, reduce or _alone)
        return shard

    def log_ratio(self, batch: TokenBatch) -> Tensor:
        """l_t = new - old (or new - mu), `[B, T]`, clamped to +-20, 0 where the mask is 0."""
        reference = batch.mu if self.reference == "mu" else batch.old
        return masked_log_ratio(batch.mask, batch.new, reference)

    def ratio(self, batch: TokenBatch) -> Tensor:
        """r_t = exp(l_t), `[B, T]`, 1 where the mask is 0."""
        return self.log_ratio(batch).exp()

    def token_advantage(self, batch: TokenBatch) -> Tensor:
        """The advantage of each token, `[B, T]`, 0 where the mask is 0."""
        advantage = batch.advantage if batch.advantage.ndim == 2 else batch.advantage[:, None]
        return torch.where(batch.mask, advantage, 0.0)

    def token_loss(self, batch: TokenBatch) -> tuple[Tensor, dict[str, Tensor]]:
        """The method: the loss of each token `[B, T]`, finite under mask 0, and what to log, each `[B, T]` or `[B]`."""
        raise NotImplementedError(f"{type(self).__name__} has no loss: write token_loss(batch)")

    def kl_to_reference(self, batch: TokenBatch) -> Tensor:
        """Estimate of the KL to the reference at each token, `[B, T]`, 0 where the mask is 0."""
        assert batch.ref is not None  # loss has checked `needs`
        return kl_estimate(masked_log_ratio(batch.mask, batch.new, batch.ref), self.kl)

    def penalty(self, batch: TokenBatch) -> tuple[Tensor, dict[str, Tensor]]:
        """beta times the KL to the reference `[B, T]`, and what to log. Called only if beta > 0."""
        estimate = self.kl_to_reference(batch)
        return self.beta * estimate, {"kl/ref": estimate}

    # -- the loss ----------------------------------------------------------------------------------------------------

    def loss(self, batch: TokenBatch, totals: Totals | None = None) -> tuple[Tensor, dict[str, Tensor]]:
        """This micro-batch's share of the optimizer step's loss, a scalar to minimise, and its metrics.

        totals: counts of the *original* loss mask over the whole optimizer step, all ranks and micro-batches; None:
        this batch is all there is. Shares *sum* to the step's loss. So do metrics: each value is this micro-batch's sum
        over masked tokens / totals.tokens (for a figure of sequences: / totals.sequences), so the sum over
        micro-batches and ranks is the step's mean. Only names ending in `_max` are reduced by max instead (-inf from a
        micro-batch without a masked token). Raises ValueError if a field in `needs` is missing or the step is empty.
        """
        totals = Totals.of(batch.mask) if totals is None else totals
        self._check(batch, totals)
        weight, kept = self.correction(batch)
        values, logged = self.token_loss(batch)
        values = torch.where(kept, values * weight.detach(), 0.0)
        logged = logged | self._ratio_metrics(batch) | self._correction_metrics(batch, weight, kept)
        by, lengths = divisor(batch.masked_lengths, totals, self.aggregation), self.correction.lengths(batch, kept)
        if lengths is not batch.masked_lengths:
            values = values * (by / divisor(lengths, totals, self.aggregation))
        if self.beta > 0:
            # Of every token, not weighted by the correction: it restrains the policy, it does not estimate the return.
            penalty, of_penalty = self.penalty(batch)
            values = values + penalty
            logged = logged | of_penalty
        loss = (torch.where(batch.mask, values, 0.0).sum(dim=1, keepdim=True) / by).sum()
        return loss, {name: _share(name, value.detach(), batch.mask, totals) for name, value in logged.items()}

    def _check(self, batch: TokenBatch, totals: Totals) -> None:
        missing = sorted(name for name in self.needs if getattr(batch, name) is None)
        if missing:
            raise ValueError(f"{self!r} needs {', '.join(missing)} in the batch, but it is None")
        if min(totals.tokens, totals.sequences, totals.max_length) < 1:
            raise ValueError(f"{totals}: the optimizer step has no token to learn from")

    def _ratio_metrics(self, batch: TokenBatch) -> dict[str, Tensor]:
        log_ratio = self.log_ratio(batch)
        return {"log_ratio/mean": log_ratio, "log_ratio/square": log_ratio**2}

    def _correction_metrics(self, batch: TokenBatch, weight: Tensor, kept: Tensor) -> dict[str, Tensor]:
        if isinstance(self.correction, NoCorrection):
            return {}
        touched = self.correction.touched(batch, weight, kept) & batch.mask
        return {
            "correction/tokens": touched.to(weight.dtype),
            "correction/sequences": touched.any(dim=1).to(weight.dtype),
            "correction/weight": weight,
            "correction/weight_max": weight,
            **self.correction.metrics(batch, weight, kept),
        }


def _alone(value: Tensor) -> Tensor:
    return value


def _share(name: str, value: Tensor, mask: Tensor, totals: Totals) -> Tensor:
    """What one micro-batch adds to the step's figure: see `Objective.loss`."""
    counted, total = (mask, totals.tokens) if value.ndim == 2 else (mask.any(dim=1), totals.sequences)
    if name.endswith("_max"):
        return torch.where(counted, value, -torch.inf).amax() if value.numel() else value.new_tensor(-torch.inf)
    return torch.where(counted, value, 0.0).sum() / total
