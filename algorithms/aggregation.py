"""From per-token losses to one scalar, so that any split over ranks and micro-batches *sums* to the same value.

Every denominator is either global (`Totals`) or belongs to one sequence, and sequences are never cut.
"""

from __future__ import annotations

from typing import Literal, get_args

from torch import Tensor

from rltk.algorithms.batch import Totals

Aggregation = Literal["token-mean", "seq-mean-token-mean", "seq-mean-token-sum", "seq-mean-token-sum-norm", "token-sum"]
AGGREGATIONS: tuple[str, ...] = get_args(Aggregation)


def divisor(lengths: Tensor, totals: Totals, how: Aggregation) -> Tensor | int:
    """What a token's loss is divided by: the sum of the quotients is the step's loss. `[B, 1]`, or one number for all.

    lengths `[B]` integers: tokens of each sequence (of the original loss mask). `token-mean`: sum / global tokens.
    `seq-mean-token-mean`: mean over global sequences of each one's token mean. `seq-mean-token-sum`: mean of token
    sums. `seq-mean-token-sum-norm`: that over L_max (Dr.GRPO, 2503.20783). `token-sum`: the plain sum.
    """
    if how == "token-sum":
        return 1
    if how == "token-mean":
        return totals.tokens
    sequences = totals.sequences
    if how == "seq-mean-token-mean":
        return lengths[:, None].clamp(min=1) * sequences
    return totals.max_length * sequences if how == "seq-mean-token-sum-norm" else sequences
