"""DelTA's token weights (arXiv 2605.21467), in Triton: `DelTA._weights` of algorithms/delta.py is the torch reference.

    side_sums      grid (block of d, share of the tokens)     pass 1 and each refinement's second
        counts_t v_t and counts_t, by side; counts: |A|, or |A| sigmoid(margin / sd)     -> partial [S, 2, d + 1]
    nearness_sums  grid (share of the tokens)                 each refinement's first pass, and the last
        v_t . 2 (c+ - c-) - (|c+|^2 - |c-|^2), or the weight that follows from it        -> result [B, T]
        how many, their sum and that of their squares, by side                           -> partial [S, 2, 3]
    by_their_mean  grid (tile of tokens)
        weights / their mean -> weights; their sd -> spread

A pass reads the hidden states once, four with one refinement: 512 x 4096 tokens, d = 64, fp32 are 4 x 537 MB, .54 ms at
4 TB/s. Step by step in torch the host takes longer than that to issue them, so all that lies between two passes is in a
kernel, save the sums over the shares: torch adds those in a fixed order, and the same batch gives the same bits.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import triton
import triton.language as tl
from torch import Tensor

TINY = tl.constexpr(1e-8)  # as in the reference: of a sum of advantages or a variance of margins, less is none
TOKENS, WIDTH = 64, 64  # of a tile, 16 KiB in fp32: four programs of it on a multiprocessor keep its memory busy
PROGRAMS = 1056  # 8 for each multiprocessor of an H200; on another device the sums are taken in the same order


@triton.jit
def _tokens(old, mask, advantage, at, n):
    """The tile's A, 1 - p (0 where the mask is 0) and mask; 0 past the end."""
    there = at < n
    sampled = tl.load(mask + at, mask=there, other=0) != 0
    x = tl.load(old + at, mask=there, other=0)
    # expm1, which Triton has not: exp(x) - 1 would lose the digits of tokens that were nearly certain.
    series = tl.full(x.shape, 1.0, tl.float32)
    for i in tl.static_range(6):
        series = 1 + series * x / (7 - i)
    unsure = -tl.where(x > -0.25, x * series, tl.exp(x) - 1)
    return tl.load(advantage + at, mask=there, other=0), tl.where(sampled, unsure, 0), sampled


@triton.jit
def _states(hidden, at, d, n, D: tl.constexpr):
    """h [TOKENS, WIDTH]. Where the mask is 0 too: times a count of 0, what is not finite still makes the sums NaN."""
    place = hidden + at.to(tl.int64)[:, None] * D + d[None, :]
    return tl.load(place, mask=(at < n)[:, None] & (d < D)[None, :], other=0).to(tl.float32)


@triton.jit
def _centroids(sums, d, D: tl.constexpr):
    """c+ and c- at d, 0 past the end."""
    right = tl.load(sums + d, mask=d < D, other=0) / tl.maximum(tl.load(sums + D), TINY)
    wrong = tl.load(sums + D + 1 + d, mask=d < D, other=0) / tl.maximum(tl.load(sums + 2 * D + 1), TINY)
    return right, wrong


@triton.jit
def _one_over_sd(powers):
    """Of one side, from how many, sum and squares. In float64: mean and spread of the margins may lie far apart."""
    count = tl.maximum(tl.load(powers), 1)
    mean = tl.load(powers + 1) / count
    variance = tl.load(powers + 2) / count - mean * mean
    return 1 / tl.sqrt(tl.maximum(variance, TINY).to(tl.float32))


@triton.jit
def _add(count, total, square, value, counted):
    value = tl.where(counted, value, 0)
    return count + counted.to(tl.float32), total + value, square + value * value


@triton.jit
def _leave(place, count, total, square):
    tl.store(place, tl.sum(count.to(tl.float64), 0))
    tl.store(place + 1, tl.sum(total.to(tl.float64), 0))
    tl.store(place + 2, tl.sum(square.to(tl.float64), 0))


@triton.jit
def side_sums(
    hidden, old, mask, advantage, nearness, powers, partial, n,
    REFINED: tl.constexpr, D: tl.constexpr, TOKENS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    block, share = tl.program_id(0), tl.program_id(1)
    d = block * WIDTH + tl.arange(0, WIDTH)
    zeros, none = tl.zeros([TOKENS, WIDTH], tl.float32), tl.zeros([TOKENS], tl.float32)
    right, wrong, right_counts, wrong_counts = zeros, zeros, none, none  # the tile's tokens are summed after the last
    if REFINED:
        right_unit, wrong_unit = _one_over_sd(powers), _one_over_sd(powers + 3)
    for tile in tl.range(share, tl.cdiv(n, TOKENS), tl.num_programs(1)):
        at = tile * TOKENS + tl.arange(0, TOKENS)
        h = _states(hidden, at, d, n, D)  # asked for before anything waits
        a, unsure, _ = _tokens(old, mask, advantage, at, n)
        counts = tl.abs(a)
        if REFINED:
            unit = tl.where(a > 0, right_unit, -wrong_unit)
            counts *= tl.sigmoid(tl.load(nearness + at, mask=at < n, other=0) * unit)
        of_right, of_wrong = tl.where(a > 0, counts, 0), tl.where(a < 0, counts, 0)
        right += (of_right * unsure)[:, None] * h
        wrong += (of_wrong * unsure)[:, None] * h
        right_counts += of_right
        wrong_counts += of_wrong
    partial += share * 2 * (D + 1)
    tl.store(partial + d, tl.sum(right, 0), mask=d < D)
    tl.store(partial + D + 1 + d, tl.sum(wrong, 0), mask=d < D)
    if block == 0:
        tl.store(partial + D, tl.sum(right_counts, 0))
        tl.store(partial + 2 * D + 1, tl.sum(wrong_counts, 0))


@triton.jit
def nearness_sums(
    hidden, old, mask, advantage, sums, powers, result, partial, n, low, span,
    WEIGHED: tl.constexpr, D: tl.constexpr, TOKENS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    share, r = tl.program_id(0), tl.arange(0, WIDTH)
    squares = tl.zeros([WIDTH], tl.float32)
    for start in tl.range(0, D, WIDTH):
        right, wrong = _centroids(sums, start + r, D)
        squares += (right - wrong) * (right + wrong)
    offset = tl.sum(squares, 0)
    none = tl.zeros([TOKENS], tl.float32)
    count, total, square, wrong_count, wrong_total, wrong_square = none, none, none, none, none, none
    if WEIGHED:
        right_unit, wrong_unit = _one_over_sd(powers), _one_over_sd(powers + 3)
    for tile in tl.range(share, tl.cdiv(n, TOKENS), tl.num_programs(0)):
        at = tile * TOKENS + tl.arange(0, TOKENS)
        a, unsure, sampled = _tokens(old, mask, advantage, at, n)
        along = tl.zeros([TOKENS, WIDTH], tl.float32)
        for start in tl.range(0, D, WIDTH):
            right, wrong = _centroids(sums, start + r, D)
            along += _states(hidden, at, start + r, n, D) * (2 * (right - wrong))[None, :]
        value = tl.sum(along, 1) * unsure - offset
        counted = a > 0
        if WEIGHED:
            value = low + span * tl.sigmoid(value * tl.where(a > 0, right_unit, -wrong_unit))
            value = tl.where(a == 0, low, value)
            counted = sampled & (a >= 0)  # with the wrong side's: every token
        tl.store(result + at, value, mask=at < n)
        count, total, square = _add(count, total, square, value, counted)
        wrong_count, wrong_total, wrong_square = _add(wrong_count, wrong_total, wrong_square, value, a < 0)
    _leave(partial + share * 6, count, total, square)
    _leave(partial + share * 6 + 3, wrong_count, wrong_total, wrong_square)


@triton.jit
def by_their_mean(weights, sums, spread, n, TILE: tl.constexpr):
    count, square = tl.load(sums), tl.load(sums + 2)
    total = tl.maximum(tl.load(sums + 1), TINY)  # no token at all: weights of 0
    at = tl.program_id(0) * TILE + tl.arange(0, TILE)
    mean_one = tl.load(weights + at, mask=at < n) * (count / total).to(tl.float32)
    tl.store(weights + at, mean_one, mask=at < n)
    if tl.program_id(0) == 0:
        tl.store(spread, tl.sqrt(tl.maximum(square * count / (total * total) - 1, 0).to(tl.float32)))


def delta_weights(
    hidden: Tensor, old: Tensor, mask: Tensor, advantage: Tensor, reduce: Callable[[Tensor], Tensor],
    refinements: int, low: float, high: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """w `[B, T]`, its sd `[]`, and the sum of what was divided by its mean, float64 `[]`: NaN if a hidden state is not
    finite. All fp32 but `hidden` `[B, T, d]`, of any type, and `mask`, bool; `advantage` is 0 where the mask is 0.

    reduce: sums over ranks, called as often and with the same shapes as by the reference, on a rank without tokens too.
    """
    n, width = old.numel(), hidden.shape[2]
    tokens = [value.contiguous() for value in (hidden, old, mask, advantage)]
    tiles, blocks = triton.cdiv(n, TOKENS), max(1, triton.cdiv(width, WIDTH))
    shares, shares_of_block = (max(1, min(tiles, most)) for most in (PROGRAMS, PROGRAMS // blocks))
    result, spread = torch.empty_like(tokens[1]), old.new_empty(())
    vectors = old.new_empty(shares_of_block, 2, width + 1)
    powers = old.new_empty(shares, 2, 3, dtype=torch.float64)
    tile = dict(D=width, TOKENS=TOKENS, WIDTH=WIDTH)

    def of_sides(units: Tensor, refined: bool) -> Tensor:
        side_sums[(blocks, shares_of_block)](*tokens, result, units, vectors, n, REFINED=refined, **tile)
        return reduce(vectors.sum(dim=0))

    def of_tokens(sums: Tensor, units: Tensor, weighed: bool) -> Tensor:
        arguments = (*tokens, sums, units, result, powers, n, low, high - low)
        nearness_sums[(shares,)](*arguments, WEIGHED=weighed, **tile)
        return reduce(powers.sum(dim=(0, 1) if weighed else 0))

    units = powers  # read once they are known
    sums = of_sides(units, False)
    for _ in range(max(1, refinements)):
        units = of_tokens(sums, units, False)
        sums = of_sides(units, True) if refinements else sums
    total = of_tokens(sums, units, True)
    by_their_mean[(max(1, triton.cdiv(n, 1024)),)](result, total, spread, n, TILE=1024)
    return result, spread, total[1]
