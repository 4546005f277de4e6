"""What an objective sees: per-token scalars of whole sequences, padded, and the optimizer step's global counts."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

_TOKENS = ("old", "mu", "ref", "entropy", "hellinger", "forward_kl")  # [B, T], like `new`
_SEQUENCES = ("reward", "pass_rate", "group_length")  # [B]
_CONSTANTS = ("old", "mu", "ref", "advantage")  # never differentiated


@dataclass(frozen=True)
class TokenBatch:
    """Padded `[B, T]` scalars of B whole sequences. Log-probs are of softmax(logits / T), float32 (tests: float64).

    Values under mask 0 (prompt, tool output, padding) may be anything: no objective reads them. `hidden` alone must be
    finite there: it is too large to be copied without them. New fields are only ever appended, None by default. Raises
    ValueError naming the field when shapes, dtypes or mask values do not fit.
    """

    new: Tensor  # [B, T] learner's log-probs now; the only field that carries gradient to the policy
    old: Tensor  # [B, T] learner's at the start of the update (ratio.reference=mu: `new` of the step's first minibatch)
    mu: Tensor  # [B, T] the sampler's own, recorded while sampling
    mask: Tensor  # [B, T] 1 on tokens the model sampled; any dtype with values 0 and 1, kept as bool
    advantage: Tensor  # [B] or [B, T]
    group: Tensor  # [B] integers: sequences of one prompt share a number
    ref: Tensor | None = None  # [B, T] frozen reference
    entropy: Tensor | None = None  # [B, T] in units of log V, so in [0, 1]
    hellinger: Tensor | None = None  # [B, T] squared Hellinger distance of new and ref
    forward_kl: Tensor | None = None  # [B, T] KL(ref || new) over the vocabulary
    reward: Tensor | None = None  # [B]
    pass_rate: Tensor | None = None  # [B] k/n of the whole group, before sharding
    group_length: Tensor | None = None  # [B] mean masked length of the group's right answers; inf if it has none
    hidden: Tensor | None = None  # [B, T, d] last hidden states that predict the tokens, before the step; in `prepare`

    def __post_init__(self) -> None:
        if self.new.ndim != 2 or self.new.dtype not in (torch.float32, torch.float64):
            raise ValueError(f"new is {_describe(self.new)}; it must be float32 (or float64) of shape [B, T]")
        shape, rows = self.new.shape, self.new.shape[:1]
        for name in _TOKENS:
            self._check(name, shape)
        for name in _SEQUENCES:
            self._check(name, rows)
        self._check("advantage", shape if self.advantage.ndim == 2 else rows)
        if self.hidden is not None and (self.hidden.ndim != 3 or self.hidden.shape[:2] != shape):
            raise ValueError(f"hidden is {_describe(self.hidden)}; it must be of shape {[*shape, 'd']}")
        if self.group.shape != rows or self.group.is_floating_point():
            raise ValueError(f"group is {_describe(self.group)}; it must be integers of shape {list(rows)}")
        if self.mask.shape != shape:
            raise ValueError(f"mask is {_describe(self.mask)}; it must be of shape {list(shape)}, like new")
        if self.mask.dtype != torch.bool:
            if not ((self.mask == 0) | (self.mask == 1)).all():
                raise ValueError("mask holds values other than 0 and 1")
            object.__setattr__(self, "mask", self.mask.bool())
        for name in _CONSTANTS:
            value = getattr(self, name)
            if value is not None and value.requires_grad:
                raise ValueError(f"{name} carries gradient; pass {name}.detach(): only new may")

    def _check(self, name: str, shape: torch.Size) -> None:
        value = getattr(self, name)
        if value is None:
            return
        if value.shape != shape or value.dtype != self.new.dtype:
            raise ValueError(f"{name} is {_describe(value)}; it must be {self.new.dtype} of shape {list(shape)}")

    @cached_property
    def masked_lengths(self) -> Tensor:
        """Sampled tokens of each sequence, int64 `[B]`."""
        return self.mask.sum(dim=1)

    def select(self, rows: Tensor | slice) -> TokenBatch:
        """The same batch with only these sequences (an index, a bool mask `[B]` or a slice)."""
        return self._map(lambda value: value[rows])

    def to(self, device: torch.device | str) -> TokenBatch:
        """The same batch on another device."""
        return self._map(lambda value: value.to(device))

    def _map(self, change: Callable[[Tensor], Tensor]) -> TokenBatch:
        present: dict[str, Any] = {f.name: getattr(self, f.name) for f in fields(self)}
        changed: dict[str, Any] = {name: change(value) for name, value in present.items() if value is not None}
        return TokenBatch(**changed)


@dataclass(frozen=True)
class Totals:
    """Global counts of one optimizer step's *original* loss mask, over all ranks and micro-batches.

    `sequences` counts those with at least one masked token: padding rows never count. `max_length` is the constant
    L_max of `seq-mean-token-sum-norm`, the run's longest allowed response in tokens.
    """

    tokens: int
    sequences: int
    max_length: int

    @classmethod
    def of(cls, mask: Tensor, max_length: int | None = None) -> Totals:
        """Counts of `mask` `[B, T]`; `max_length` None: the longest masked length in it."""
        lengths = mask.bool().sum(dim=1)
        if max_length is None:
            max_length = int(lengths.max()) if lengths.numel() else 0
        return cls(int(lengths.sum()), int((lengths > 0).sum()), max_length)

    def __add__(self, other: Totals) -> Totals:
        longest = max(self.max_length, other.max_length)
        return Totals(self.tokens + other.tokens, self.sequences + other.sequences, longest)


def _describe(value: Tensor) -> str:
    return f"{value.dtype} of shape {list(value.shape)}"
