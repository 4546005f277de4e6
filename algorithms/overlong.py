"""The soft penalty on long responses that DAPO (2503.14476) and FAPO (2510.22543) add to their rewards."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from rltk.algorithms.batch import TokenBatch
from rltk.algorithms.objective import Sample


def overlong_penalty(lengths: Tensor, max_length: int, buffer: int) -> Tensor:
    """min(-(n - (max_length - buffer)) / buffer, 0), never below -1, of `lengths` n in sampled tokens; float64.

    0 up to max_length - buffer, then linear down to -1 at max_length. A buffer that is not smaller than max_length
    would punish the first token: it turns the penalty off, as 0 does.
    """
    if not overlong_on(max_length, buffer):
        return torch.zeros_like(lengths, dtype=torch.float64)
    return ((max_length - buffer - lengths.double()) / buffer).clamp(-1.0, 0.0)


def overlong_on(max_length: int, buffer: int) -> bool:
    """Whether there is a penalty at all."""
    return 0 < buffer < max_length


def add_overlong_penalty(
    rewards: Sequence[float | None], group: Sequence[Sample], max_length: int, buffer: int
) -> list[float | None]:
    """Each reward plus the penalty on its sample's length; None (nobody could tell) stays None."""
    penalties = overlong_penalty(torch.tensor([sample.length for sample in group]), max_length, buffer).tolist()
    return [None if r is None else r + penalty for r, penalty in zip(rewards, penalties, strict=True)]


def overlong_metrics(batch: TokenBatch, max_length: int, buffer: int) -> dict[str, Tensor]:
    """`overlong/penalty` `[B]`, so that a run shows what its lengths cost; nothing where the penalty is off."""
    if not overlong_on(max_length, buffer):
        return {}
    return {"overlong/penalty": overlong_penalty(batch.masked_lengths, max_length, buffer).to(batch.new.dtype)}
