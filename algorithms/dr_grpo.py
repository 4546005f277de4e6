"""Dr. GRPO (2503.20783; code): GRPO without its bias to long wrong answers and to very easy or hard prompts.

    A = R - mean, not divided by the group's deviation
    loss = sum over all tokens / (sequences * L_max), not by each sequence's own length

with GRPO's loss_t. L_max is the run's longest allowed response (`Totals.max_length`), the same for every step.
"""

from __future__ import annotations

from rltk.algorithms.grpo import GRPO


class DrGRPO(GRPO):
    """GRPO with `std` False and `aggregation` seq-mean-token-sum-norm."""

    std = False
    aggregation = "seq-mean-token-sum-norm"
