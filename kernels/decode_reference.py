"""One decode step over a cache of fixed slots, in torch: serves the CPU engine and is the oracle of kernels/decode.py.

A request's tokens lie in slots, slot s on page `block_table[r, s // N]`. With n the request's length (new token
included, dropped tokens not) and `cap` slots to hold it:

    n <= cap: the new token takes slot n - 1          n > cap: it overwrites the victim
    the query attends to min(n, cap) slots, the new one among them
    longflow, h2o: the victim of the *next* step is the slot of least score, outside the protected ones, lowest first

LongFlow (arXiv 2603.11504): score = sum over heads of attention x ||v||_1. H2O (arXiv 2306.14048): attention summed
over all steps. Streaming (arXiv 2309.17453): a ring after the sinks.
"""

from __future__ import annotations

import torch
from torch import Tensor

from rltk.kernels.state import DecodeSettings, DecodeState


def decode(
    query: Tensor, key: Tensor, value: Tensor, cache: Tensor, block_table: Tensor, seq_lens: Tensor,
    state: DecodeState, settings: DecodeSettings, output: Tensor,
) -> None:  # fmt: skip
    """Store the new tokens, attend, choose the next victims. Computes in fp32, in float64 if `query` is.

    query, output [R, Hq, D]; key, value [R, Hkv, D]; cache [NB, Hkv, N, 2D] (K, then V); block_table [R, MB] int32;
    seq_lens [R] int32, the new token included; a row with 0 is padding: its output is 0 and nothing else is touched.
    """
    if state.evicted is not None:
        state.evicted[: len(seq_lens)] = -1
    output[seq_lens == 0] = 0
    rows = (seq_lens > 0).nonzero().squeeze(1)
    if not len(rows):
        return
    kv_heads, page = cache.shape[1:3]
    dim = cache.shape[3] // 2
    table = block_table[rows].long()
    first = table[:, 0]
    n = seq_lens[rows].long() - state.dropped[first].long()
    valid = n.clamp(max=settings.cap)
    heads = torch.arange(kv_heads, device=cache.device)

    slot = new_slots(n, state.evict[first].long(), settings).expand(-1, kv_heads)
    at = (table.gather(1, slot // page), heads, slot % page)  # each [r, Hkv] or [Hkv]
    position = (seq_lens[rows] - 1 - settings.pseudo)[:, None].expand(-1, kv_heads)
    if state.slot_pos is not None:
        if state.evicted is not None:
            state.evicted[rows] = torch.where((n > settings.cap)[:, None], state.slot_pos[at], -1)
        state.slot_pos[at] = position
    if state.acc is not None:
        state.acc[at] = 0
    cache[at] = torch.cat((key[rows], value[rows]), -1)

    used = -(-int(valid.max()) // page)
    table = table[:, :used]
    slots = torch.arange(used * page, device=cache.device)
    free = slots >= valid[:, None]  # [r, S]: no token there; the memory may hold anything
    table = torch.where(free[:, ::page], 0, table)  # nor need the block be the request's
    held = _by_slot(cache, table).to(torch.promote_types(query.dtype, torch.float32))
    held = held.masked_fill(free[:, None, :, None], 0)
    k, v = held[..., :dim], held[..., dim:]  # [r, Hkv, S, D]
    q = query[rows].to(k.dtype).unflatten(1, (kv_heads, -1))  # [r, Hkv, G, D]
    logits = (q @ k.transpose(-1, -2)) * settings.scale
    alpha = logits.masked_fill(free[:, None, None], -torch.inf).softmax(-1)
    output[rows] = (alpha @ v).flatten(1, 2).to(output.dtype)

    if settings.mode not in ("longflow", "h2o"):
        return
    received = alpha.sum(2)  # [r, Hkv, S]: over the query heads of a KV head
    kept = free | (slots < settings.sinks)
    kept = kept[:, None].expand_as(received)
    if settings.mode == "longflow":
        score = received * v.abs().sum(-1)
    else:
        assert state.acc is not None and state.slot_pos is not None
        score = _by_slot(state.acc, table).to(received.dtype) + received
        r, s = (~free).nonzero(as_tuple=True)
        state.acc[table[r, s // page], :, s % page] = score[r, :, s].to(state.acc.dtype)
        kept = kept | (_by_slot(state.slot_pos, table) > position[..., None] - settings.recent)
    if state.evict.shape[1] == 1:
        # Heads that share their victims hold the same recent tokens in the same slots: the first speaks for all.
        score, kept = score.sum(1, keepdim=True), kept[:, :1]
    victim = score.masked_fill(kept, torch.inf).argmin(-1).to(torch.int32)  # the first of equals
    full = n >= settings.cap  # before that the next token has a slot of its own
    state.evict[first[full]] = victim[full]


def new_slots(n: Tensor, evict: Tensor, settings: DecodeSettings) -> Tensor:
    """Slot of the new token: [r] lengths, [r, Hv] victims -> [r, Hv]."""
    if settings.mode == "append":
        return (n - 1)[:, None].expand_as(evict)
    if settings.mode == "ring":
        oldest = settings.sinks + (n - 1 - settings.sinks) % (settings.cap - settings.sinks)
        evict = oldest[:, None].expand_as(evict)
    return torch.where((n <= settings.cap)[:, None], (n - 1)[:, None], evict)


def _by_slot(pages: Tensor, table: Tensor) -> Tensor:
    """[NB, Hkv, N, ...] pages of the requests' blocks [r, B] -> [r, Hkv, B x N, ...]."""
    return pages[table].transpose(1, 2).flatten(2, 3)
