"""From per-token losses to one scalar, so that any split over ranks and micro-batches *sums* to the same value.

Every denominator is either global (`Totals`) or belongs to one sequence, and sequences are never cut.
"""

from __future__ import annotations

from typing import Literal, get_args

from torch import Tensor

from rltk.algorithms.batch import Totals

Aggregation = Literal["token-mean", "seq-mean-token-mean", "seq-mean-token-sum", "seq-mean-token-sum-norm", "token-sum"]
AGGREGATIONS: tuple[str, ...] = get_args(Aggregation)


def aggregate(values: Tensor, counted: Tensor, totals: Totals, how: Aggregation) -> Tensor:
    """This micro-batch's share of the step's loss, a scalar.

    values `[B, T]`, 0 where nothing is to be learned. counted `[B, T]` bool: the tokens that make up a sequence's
    length (the original loss mask). `token-mean`: sum / global tokens. `seq-mean-token-mean`: mean over global
    sequences of each one's token mean. `seq-mean-token-sum`: mean of token sums. `seq-mean-token-sum-norm`: that over
    L_max (Dr.GRPO, 2503.20783). `token-sum`: the plain sum.
    """
    if how == "token-sum":
        return values.sum()
    if how == "token-mean":
        return values.sum() / totals.tokens
    sums = values.sum(dim=1)
    if how == "seq-mean-token-mean":
        sums = sums / counted.sum(dim=1).clamp(min=1)
    elif how == "seq-mean-token-sum-norm":
        sums = sums / totals.max_length
    return sums.sum() / totals.sequences
