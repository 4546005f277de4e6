"""One decode step over a cache of fixed slots, in Triton: kernels/decode_reference.py says what it computes.

    longflow_decode   grid (split, KV head, row): one pass over the K and V of a share of the row's slots
        the new K/V is stored, and used from registers     -> cache
        q.k of every slot and query head, ||v||_1          -> scores     12 B a slot at two query heads a KV head,
        softmax over the share                             -> partial, lse     against 512 B read
    longflow_combine  grid (row, KV heads + chunks of slots)
        shares joined                                      -> output
        each slot's score, the chunk's least by (score, slot): the lowest slot of equals wins -> best
        the chunk that comes last                          -> evict

Grids depend on shapes alone and nothing returns to the host, so a CUDA graph may hold any of it. Logits are in base 2.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from rltk.kernels.state import DecodeSettings, DecodeState

LOG2E = tl.constexpr(1.4426950408889634)
LOWEST = tl.constexpr(-1e30)  # start of a running maximum: finite, so that a share without slots makes no NaN
NEVER = tl.constexpr(0x7FF0000000000000)  # above every (score, slot)

# Tuned on an H200 (head size 128). Slots of a tile, which lies in one page -> (warps, stages).
TILES = {64: (2, 3), 32: (1, 3), 16: (1, 5)}
FLOAT32 = (16, 8, 2)  # no matrix unit multiplies it exactly: smaller tiles, or registers spill
SHARE = 1600  # slots that one program reads, fewer where the batch is too small to fill the device
PROGRAMS = 1024
CHUNK_ELEMENTS = 4096  # heads x slots of a program that scores


@triton.jit
def longflow_decode(
    query, key, value, cache, block_table, seq_lens, dropped, evict, slot_pos, evicted, scores, partial, lse, best,
    arrived, query_row, query_head, key_row, key_head, value_row, value_head, block_stride, head_stride, table_stride,
    scale, cap, sinks, pseudo, length,
    MODE: tl.constexpr, G: tl.constexpr, GP: tl.constexpr, D: tl.constexpr, N: tl.constexpr, HV: tl.constexpr,
    SCORES: tl.constexpr, POSITIONS: tl.constexpr, RECORD: tl.constexpr, TILE: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    split, head, row = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    splits, heads = tl.num_programs(0), tl.num_programs(1)
    total = tl.load(seq_lens + row)
    if total == 0:
        return
    table = block_table + row * table_stride
    first = tl.load(table).to(tl.int64)
    n = total - tl.load(dropped + first)
    used = tl.minimum(n, cap)
    slot = n - 1
    if MODE == "ring":
        slot = tl.where(n <= cap, slot, sinks + (n - 1 - sinks) % (cap - sinks))
    elif MODE != "append":
        slot = tl.where(n <= cap, slot, tl.load(evict + first * HV + head % HV))

    # Rows of a tile: the KV head's query heads, then one for ||v||_1, then padding up to what a matrix unit takes.
    group, d, r = tl.arange(0, GP), tl.arange(0, D), tl.arange(0, TILE)
    at = (row * heads + head).to(tl.int64)
    scores += at * (G + 1) * length
    queries = query + row * query_row + (head * G + group[:, None]) * query_head + d[None, :]
    q = tl.load(queries, mask=group[:, None] < G, other=0)
    scale *= LOG2E
    m = tl.full([GP], LOWEST, tl.float32)
    mass = tl.zeros([GP], tl.float32)
    acc = tl.zeros([GP, D], tl.float32)
    pages = cache + head * head_stride

    if split == 0:  # The new token. All splits pass over its slot, so storing it races with nothing.
        k_new = tl.load(key + row * key_row + head * key_head + d)
        v_new = tl.load(value + row * value_row + head * value_head + d)
        block = tl.load(table + slot // N).to(tl.int64)
        place = pages + block * block_stride + (slot % N) * (2 * D) + d
        tl.store(place, k_new)
        tl.store(place + D, v_new)
        m = tl.sum(q.to(tl.float32) * k_new.to(tl.float32)[None, :], 1) * scale
        mass += 1
        acc += v_new.to(tl.float32)[None, :]
        if SCORES:
            tl.store(scores + group * length + slot, m, mask=group < G)
            tl.store(scores + G * length + slot, tl.sum(tl.abs(v_new.to(tl.float32)), 0))
            if head < HV:
                tl.store(best + row * HV + head, NEVER)
                tl.store(arrived + row * HV + head, 0)
        if POSITIONS:
            position = slot_pos + (block * heads + head) * N + slot % N
            if RECORD:
                tl.store(evicted + row * heads + head, tl.where(n > cap, tl.load(position), -1))
            tl.store(position, total - 1 - pseudo)

    # ||v||_1 by the matrix unit too: V then has one layout in shared memory, without bank conflicts.
    ones = (tl.zeros([GP, D], tl.float32) + tl.where(group == G, 1.0, 0.0)[:, None]).to(q.dtype)
    tiles = tl.cdiv(used, TILE)
    for tile in tl.range(tiles * split // splits, tiles * (split + 1) // splits, num_stages=STAGES):
        page = pages + tl.load(table + tile * TILE // N).to(tl.int64) * block_stride
        slots = tile * TILE + r
        seen = (slots < used) & (slots != slot)
        place = page + (tile * TILE % N + r)[:, None] * (2 * D) + d[None, :]
        k = tl.load(place, mask=seen[:, None], other=0)
        v = tl.load(place + D, mask=seen[:, None], other=0)
        s = tl.dot(q, tl.trans(k), input_precision="ieee") * scale  # [GP, TILE]
        if SCORES:
            s = tl.dot(ones, tl.trans(tl.abs(v)), acc=s, input_precision="ieee")
            tl.store(scores + group[:, None] * length + slots[None, :], s, mask=(group <= G)[:, None] & seen[None, :])
        s = tl.where(seen[None, :], s, float("-inf"))
        top = tl.maximum(m, tl.max(s, 1))
        p = tl.exp2(s - top[:, None])
        fade = tl.exp2(m - top)
        mass = mass * fade + tl.sum(p, 1)
        acc = tl.dot(p.to(v.dtype), v, acc=acc * fade[:, None], input_precision="ieee")
        m = top

    share = (at * G + group) * splits + split
    tl.store(lse + share, m + tl.log2(mass), mask=group < G)  # -inf where the share has no slots
    mean = acc / tl.maximum(mass, 1e-30)[:, None]
    tl.store(partial + share[:, None] * D + d[None, :], mean, mask=group[:, None] < G)


@triton.jit
def _join_shares(
    output, partial, lse, total, row, head, output_row, output_head,
    G: tl.constexpr, GP: tl.constexpr, D: tl.constexpr, H: tl.constexpr, SPLITS: tl.constexpr, SP: tl.constexpr,
):  # fmt: skip
    """Output of a KV head's query heads: shares weighted by their softmax sums; 0 in a padded row."""
    group, split, d = tl.arange(0, GP), tl.arange(0, SP), tl.arange(0, D)
    at = (row.to(tl.int64) * H + head) * G + group
    real = group < tl.where(total > 0, G, 0)
    known = real[:, None] & (split < SPLITS)[None, :]
    shares = tl.load(lse + at[:, None] * SPLITS + split[None, :], mask=known, other=float("-inf"))
    shares = tl.where(real[:, None], shares, 0)
    weight = tl.exp2(shares - tl.max(shares, 1)[:, None])
    weight = weight / tl.sum(weight, 1)[:, None]
    places = (at[:, None, None] * SPLITS + split[None, :, None]) * D + d[None, None, :]
    parts = tl.load(partial + places, mask=known[:, :, None], other=0)
    place = output + row * output_row + (head * G + group[:, None]) * output_head + d[None, :]
    tl.store(place, tl.sum(weight[:, :, None] * parts, 1), mask=group[:, None] < G)


@triton.jit
def _choose_victim(
    table, evict, acc, slot_pos, scores, lse, best, arrived, row, victims, chunk, n, newest, cap, sinks, recent, length,
    MODE: tl.constexpr, G: tl.constexpr, GP: tl.constexpr, N: tl.constexpr, H: tl.constexpr, HV: tl.constexpr,
    HP: tl.constexpr, SPLITS: tl.constexpr, SP: tl.constexpr, CHUNK: tl.constexpr, CHUNKS: tl.constexpr,
):  # fmt: skip
    """Scores of a chunk of slots over the KV heads that share a victim; the last chunk to come names it."""
    slots = chunk * CHUNK + tl.arange(0, CHUNK)
    there = slots < tl.minimum(n, cap)
    head = tl.arange(0, HP)
    inside = head < H // HV
    head += victims * (H // HV)
    group, split = tl.arange(0, GP), tl.arange(0, SP)
    at = row.to(tl.int64) * H + head
    real = (inside[:, None] & (group < G)[None, :])[:, :, None]

    shares = lse + (at[:, None] * G + group[None, :])[:, :, None] * SPLITS + split[None, None, :]
    shares = tl.load(shares, mask=real & (split < SPLITS)[None, None, :], other=float("-inf"))
    shares = tl.where(real, shares, 0)
    over = tl.max(shares, 2)
    whole = over + tl.log2(tl.sum(tl.exp2(shares - over[:, :, None]), 2))  # [HP, GP]: log of the softmax' sum
    scores += at * (G + 1) * length
    x = scores[:, None, None] + group[None, :, None] * length + slots[None, None, :]
    x = tl.load(x, mask=real & there[None, None, :], other=float("-inf"))
    received = tl.sum(tl.exp2(x - whole[:, :, None]), 1)  # [HP, CHUNK]
    held = inside[:, None] & there[None, :]
    kept = (slots < sinks) | ~there
    if MODE == "longflow":
        score = received * tl.load(scores[:, None] + G * length + slots[None, :], mask=held, other=0)
    else:
        block = tl.load(table + slots // N, mask=there, other=0).to(tl.int64)
        places = (block[None, :] * H + head[:, None]) * N + (slots % N)[None, :]
        position = tl.load(slot_pos + places, mask=held, other=0)
        so_far = tl.load(acc + places, mask=held, other=0)
        score = tl.where(position == newest, 0, so_far) + received  # the new token's slot still has its predecessor's
        tl.store(acc + places, score, mask=held)
        speaks = head[:, None] == victims * (H // HV)
        kept |= tl.sum(tl.where(speaks, position, 0), 0) > newest - recent
    score = tl.where(kept, float("inf"), tl.sum(tl.where(inside[:, None], score, 0), 0))
    # A float that is not negative sorts like its bits.
    packed = (score.to(tl.int32, bitcast=True).to(tl.int64) << 32) | slots
    tl.atomic_min(best + row * HV + victims, tl.min(packed, 0))
    if tl.atomic_add(arrived + row * HV + victims, 1) == CHUNKS - 1 and n >= cap:
        winner = tl.atomic_min(best + row * HV + victims, NEVER)
        tl.store(evict + victims, (winner & 0xFFFFFFFF).to(tl.int32))


@triton.jit
def longflow_combine(
    output, block_table, seq_lens, dropped, evict, acc, slot_pos, evicted, scores, partial, lse, best, arrived,
    output_row, output_head, table_stride, cap, sinks, recent, pseudo, length,
    MODE: tl.constexpr, G: tl.constexpr, GP: tl.constexpr, D: tl.constexpr, N: tl.constexpr, H: tl.constexpr,
    HV: tl.constexpr, HP: tl.constexpr, SPLITS: tl.constexpr, SP: tl.constexpr, CHUNK: tl.constexpr,
    CHUNKS: tl.constexpr, SCORES: tl.constexpr, RECORD: tl.constexpr,
):  # fmt: skip
    row, part = tl.program_id(0), tl.program_id(1)
    total = tl.load(seq_lens + row)
    if part < H:
        _join_shares(output, partial, lse, total, row, part, output_row, output_head, G, GP, D, H, SPLITS, SP)
        if RECORD:  # noqa: SIM102 (the compiler knows this one, not the next)
            if total == 0:
                tl.store(evicted + row * H + part, -1)
    elif SCORES and total > 0:
        table = block_table + row * table_stride
        first = tl.load(table).to(tl.int64)
        n = total - tl.load(dropped + first)
        if MODE == "h2o" or n >= cap:  # before that the next token has a slot of its own
            _choose_victim(table, evict + first * HV, acc, slot_pos, scores, lse, best, arrived,
                           row, (part - H) // CHUNKS, (part - H) % CHUNKS, n, total - 1 - pseudo, cap, sinks, recent,
                           length, MODE, G, GP, N, H, HV, HP, SPLITS, SP, CHUNK, CHUNKS)  # fmt: skip


def _tile(cache: Tensor) -> tuple[int, int, int]:
    """Slots, warps, stages."""
    page, dim = cache.shape[2], cache.shape[3] // 2
    tile = math.gcd(64, page)
    tile, warps, stages = FLOAT32 if cache.element_size() == 4 else (tile, *TILES[tile])
    return tile, warps * max(1, dim // 128), stages


def decode(
    query: Tensor, key: Tensor, value: Tensor, cache: Tensor, block_table: Tensor, seq_lens: Tensor,
    state: DecodeState, settings: DecodeSettings, output: Tensor,
) -> None:  # fmt: skip
    """Store the new tokens, attend, choose the next victims; shapes as in the reference.

    The last dimension of every tensor is contiguous, and so is each (block, head) of the cache; D is a power of two of
    16 or more, N a multiple of 16 (64 or more is fastest). Scratch: R x Hkv x slots x (G + 1) floats to keep scores in.
    Raises ValueError for other D or N.
    """
    rows, q_heads, dim = query.shape
    heads, page = cache.shape[1:3]
    if dim < 16 or dim & (dim - 1) or page % 16:
        raise ValueError(f"head size {dim}, pages of {page}: use a power of two from 16 up, and a multiple of 16")
    group, victims = q_heads // heads, state.evict.shape[1]
    sharing = heads // victims  # KV heads that share a victim
    scored = settings.mode in ("longflow", "h2o")
    length = min(settings.cap, block_table.shape[1] * page)
    tile, warps, stages = _tile(cache)
    power = triton.next_power_of_2
    # Few values, for each is compiled: a batch that fills up meets every number of rows.
    splits = max(triton.cdiv(length, SHARE), power(triton.cdiv(PROGRAMS, rows * heads)))
    splits = min(splits, triton.cdiv(length, tile), 64)
    chunk = max(64, min(1024, CHUNK_ELEMENTS // (power(sharing) * power(group))))
    chunks = triton.cdiv(length, chunk) if scored else 0

    def scratch(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=query.device)

    scores = scratch(rows, heads, group + 1, length if scored else 0)
    partial, lse = scratch(rows, q_heads, splits, dim), scratch(rows, q_heads, splits)
    best, arrived = scratch(rows, victims, dtype=torch.int64), scratch(rows, victims, dtype=torch.int32)
    longflow_decode[(splits, heads, rows)](
        query, key, value, cache, block_table, seq_lens, state.dropped, state.evict, state.slot_pos, state.evicted,
        scores, partial, lse, best, arrived, query.stride(0), query.stride(1), key.stride(0), key.stride(1),
        value.stride(0), value.stride(1), cache.stride(0), cache.stride(1), block_table.stride(0),
        settings.scale, settings.cap, settings.sinks, settings.pseudo, length,
        MODE=settings.mode, G=group, GP=max(16, power(group + 1)), D=dim, N=page, HV=victims, SCORES=scored,
        POSITIONS=state.slot_pos is not None, RECORD=state.evicted is not None, TILE=tile, STAGES=stages,
        num_warps=warps,
    )  # fmt: skip
    longflow_combine[(rows, heads + victims * chunks)](
        output, block_table, seq_lens, state.dropped, state.evict, state.acc, state.slot_pos, state.evicted,
        scores, partial, lse, best, arrived, output.stride(0), output.stride(1), block_table.stride(0),
        settings.cap, settings.sinks, settings.recent, settings.pseudo, length,
        MODE=settings.mode, G=group, GP=power(group), D=dim, N=page, H=heads, HV=victims, HP=power(sharing),
        SPLITS=splits, SP=power(splits), CHUNK=chunk, CHUNKS=chunks, SCORES=scored, RECORD=state.evicted is not None,
        num_warps=4,
    )  # fmt: skip
