"""How much a prompt's keys are attended to, in Triton: kernels/prompt_scores_reference.py says what it computes.

Two passes over the keys, because a score needs the whole softmax: `softmax_sums` (grid prompt and KV head, tile of
queries, share of the keys), then `dapq_select` (grid prompt and KV head, tile of keys), which sums the attention that
its keys receive. A query is one (token, query head of the KV head) pair. Logits are in base 2. How the work is shared
out does not depend on the number of prompts: a prompt's scores are bit for bit the same in any batch.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

LOG2E = tl.constexpr(1.4426950408889634)
LOWEST = tl.constexpr(-1e30)  # finite, so that a share which a query does not see makes no NaN
TILES = {2: (64, 64, 4), 4: (32, 32, 8)}  # bytes of an element -> queries and keys of a tile, warps
PROGRAMS = 256  # of the first pass, at least: a window of 32 queries alone would leave most of the device idle


@triton.jit
def _queries(query, row_stride, head_stride, head, tile, window, G: tl.constexpr, D: tl.constexpr, BQ: tl.constexpr):
    """A tile's queries [BQ, D] and the tokens [BQ] that they are of; past the end: -1."""
    at = tile * BQ + tl.arange(0, BQ)
    token = at // G
    place = query + token.to(tl.int64) * row_stride + (head * G + at % G) * head_stride
    q = tl.load(place[:, None] + tl.arange(0, D)[None, :], mask=(token < window)[:, None], other=0)
    return q, tl.where(token < window, token, -1)


@triton.jit
def softmax_sums(
    query, key, lse, query_prompt, query_row, query_head, key_prompt, key_row, key_head, scale, window, length, heads,
    G: tl.constexpr, D: tl.constexpr, BQ: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """lse [splits, N x Hkv, tiles x BQ]: log of the softmax' sum over a share of the keys, -inf where it sees none."""
    both, tile, split = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    prompt, head = (both // heads).to(tl.int64), both % heads
    query, key = query + prompt * query_prompt, key + prompt * key_prompt
    q, token = _queries(query, query_row, query_head, head, tile, window, G, D, BQ)
    d = tl.arange(0, D)
    m = tl.full([BQ], LOWEST, tl.float32)
    mass = tl.zeros([BQ], tl.float32)
    last = length - window + tl.minimum((tile * BQ + BQ - 1) // G, window - 1)  # key that the tile's last token sees
    tiles, splits = last // BK + 1, tl.num_programs(2)
    for part in tl.range(tiles * split // splits, tiles * (split + 1) // splits):
        column = part * BK + tl.arange(0, BK)
        place = key + column.to(tl.int64)[:, None] * key_row + head * key_head + d[None, :]
        k = tl.load(place, mask=(column < length)[:, None], other=0)
        s = tl.dot(q, tl.trans(k), input_precision="ieee") * (scale * LOG2E)
        s = tl.where(column[None, :] <= (length - window + token)[:, None], s, float("-inf"))
        top = tl.maximum(m, tl.max(s, 1))
        mass = mass * tl.exp2(m - top) + tl.sum(tl.exp2(s - top[:, None]), 1)
        m = top
    places = lse + ((split * tl.num_programs(0) + both) * tl.num_programs(1) + tile) * BQ + tl.arange(0, BQ)
    tl.store(places, m + tl.log2(mass))


@triton.jit
def dapq_select(
    query, key, lse, scores, query_prompt, query_row, query_head, key_prompt, key_row, key_head, scale, window, length,
    heads, tiles, weight, G: tl.constexpr, D: tl.constexpr, BQ: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """scores [N, Hkv, length]: weight x the sum of all queries' attention. lse [N x Hkv, tiles x BQ]."""
    both, part = tl.program_id(0), tl.program_id(1)
    prompt, head = (both // heads).to(tl.int64), both % heads
    query, key = query + prompt * query_prompt, key + prompt * key_prompt
    column = part * BK + tl.arange(0, BK)
    place = key + column.to(tl.int64)[:, None] * key_row + head * key_head + tl.arange(0, D)[None, :]
    k = tl.load(place, mask=(column < length)[:, None], other=0)
    total = tl.zeros([BK], tl.float32)
    unseen = part * BK - (length - window)  # tokens before this one see none of these keys
    for tile in tl.range(tl.maximum(unseen, 0) * G // BQ, tiles):
        q, token = _queries(query, query_row, query_head, head, tile, window, G, D, BQ)
        s = tl.dot(q, tl.trans(k), input_precision="ieee") * (scale * LOG2E)
        whole = tl.load(lse + (both * tiles + tile) * BQ + tl.arange(0, BQ))
        seen = (column[None, :] <= (length - window + token)[:, None]) & (token >= 0)[:, None]
        total += tl.sum(tl.where(seen, tl.exp2(s - whole[:, None]), 0), 0)
    tl.store(scores + both.to(tl.int64) * length + column, total * weight, mask=column < length)


def prompt_scores(query: Tensor, key: Tensor, scale: float, reduce: str = "mean") -> Tensor:
    """Causal attention of the last W tokens over all T keys: [N, W, Hq, D], [N, T, Hkv, D] -> [N, Hkv, T] fp32.

    As the reference; the last dimension of both tensors is contiguous, D is a power of two of 16 or more.
    """
    prompts, window, q_heads, dim = query.shape
    _, length, heads, _ = key.shape
    if reduce not in ("mean", "sum"):
        raise ValueError(f"reduce={reduce!r}; use mean or sum")
    if window > length:
        raise ValueError(f"{window} queries observe {length} keys; the queries are the last of the keys' tokens")
    if dim < 16 or dim & (dim - 1):
        raise ValueError(f"head size {dim}: use a power of two from 16 up")
    group, both = q_heads // heads, prompts * heads
    queries, keys, warps = TILES[query.element_size()]
    tiles, parts = triton.cdiv(window * group, queries), triton.cdiv(length, keys)
    splits = max(1, min(parts, triton.cdiv(PROGRAMS, heads * tiles)))
    lse = torch.empty(splits, both, tiles * queries, dtype=torch.float32, device=query.device)
    scores = torch.empty(prompts, heads, length, dtype=torch.float32, device=query.device)
    shape = (*query.stride()[:3], *key.stride()[:3], scale, window, length, heads)
    options = dict(G=group, D=dim, BQ=queries, BK=keys, num_warps=warps)
    softmax_sums[(both, tiles, splits)](query, key, lse, *shape, **options)
    whole = torch.logsumexp(lse / LOG2E.value, 0) * LOG2E.value
    weight = 1 / (window * group) if reduce == "mean" else 1.0
    dapq_select[(both, parts)](query, key, whole, scores, *shape, tiles, weight, **options)
    return scores
