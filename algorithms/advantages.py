"""Group-relative advantages and which samples may be learned from."""

from __future__ import annotations

import torch
from torch import Tensor


def valid_groups(group: Tensor, valid: Tensor, min_group: int = 2) -> Tensor:
    """bool `[B]`: valid samples whose group has at least `min_group` valid samples.

    group `[B]` integers, valid `[B]` bool (False: nobody could tell the reward). The caller drops every other sample
    from the batch, and so from the totals: an advantage of 0 alone would still count in the denominators.
    """
    member, count = _groups(group, valid.bool())
    return valid.bool() & (count[member] >= min_group)


def group_advantages(
    rewards: Tensor, group: Tensor, valid: Tensor, *, std: bool, ddof: int, eps: float, min_group: int
) -> Tensor:
    """A = (R - mean) / (std + eps) within each group of valid samples (2402.03300); `[B]`, in the dtype of `rewards`.

    `std` False: A = R - mean (2503.20783). Invalid samples and samples of dropped groups get 0; what `rewards` holds
    there is not read. A group of equal rewards gets exactly 0, whatever the rounding of its mean.
    """
    kept = valid_groups(group, valid, min_group)
    member, count = _groups(group, kept)
    size = count.clamp(min=1).double()
    values = torch.where(kept, rewards.double(), 0.0)
    low = torch.full_like(size, torch.inf).scatter_reduce(0, member[kept], values[kept], "amin")
    high = torch.full_like(size, -torch.inf).scatter_reduce(0, member[kept], values[kept], "amax")
    mean = torch.zeros_like(size).index_add(0, member, values) / size
    spread = high > low
    centred = torch.where(kept & spread[member], values - mean[member], 0.0)
    if std:
        square = torch.zeros_like(size).index_add(0, member, centred**2)
        deviation = torch.where(spread, (square / (size - ddof).clamp(min=1)).sqrt() + eps, 1.0)
        centred = centred / deviation[member]
    return centred.to(rewards.dtype)


def _groups(group: Tensor, counted: Tensor) -> tuple[Tensor, Tensor]:
    """(index of each sample's group `[B]`, number of counted samples of each group `[groups]`)."""
    names, member = torch.unique(group, return_inverse=True)
    return member, torch.zeros_like(names, dtype=torch.long).index_add(0, member, counted.long())
