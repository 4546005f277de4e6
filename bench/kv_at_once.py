"""Forced tokens after a prompt in one pass, for caches that evict alike whatever is decoded.

A policy that keeps what decoding appends (full, dapq, snapkv), or a ring (streaming), holds known tokens at every step,
so that a mask says what each forced token sees. The sums are those of the steps through the decode kernel
(tests/unit/test_kv_quality.py); on a CPU a batch takes a tenth of their time. h2o and longflow have to step.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from rltk.rollout.kv.options import KVOptions
from rltk.rollout.kv.settings import Settings

if TYPE_CHECKING:
    from bench.kv_model import Prompts


def foreseeable(options: KVOptions) -> bool:
    return options.name == "full" or Settings(options, 1 << 20).policy.mode in ("append", "ring")


class AtOnce:
    """The cache of one policy, budget and choice of heads, and `tokens` forced ones of which the last is not run."""

    def __init__(self, prompts: Prompts, options: KVOptions, tokens: int) -> None:
        self.prompts, self.options = prompts, options
        settings = None if options.name == "full" else Settings(options, prompts.length + tokens)
        self.keep = settings.kept(prompts.length) if settings else prompts.length
        self.newest = settings.cap - options.sinks if settings and settings.policy.mode == "ring" else None

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
        """query [B, Hq, T, D], key and value [B, Hkv, T, D] of the forced tokens -> [B, Hq, T, D]."""
        prompts, kv_heads, tokens = self.prompts, key.shape[1], query.shape[2]
        chosen = prompts.chosen(layer, self.options, self.keep)
        index = chosen.expand(-1, kv_heads, -1)[..., None].expand(-1, -1, -1, key.shape[3])
        key = torch.cat((prompts.key[layer].gather(2, index), key), 2)
        value = torch.cat((prompts.value[layer].gather(2, index), value), 2)
        own = prompts.length + torch.arange(tokens, device=key.device)
        # A ring keeps the same tokens in every row and head; else only the order of the forced ones matters here.
        held = torch.cat((chosen[0, 0], own))
        seen = held <= own[:, None]  # [T, S]
        if self.newest is not None:
            seen &= (held < self.options.sinks) | (held > own[:, None] - self.newest)
        # The query heads of a KV head are rows of one product: no copies of keys.
        grouped = query.unflatten(1, (kv_heads, -1)).flatten(2, 3)
        mask = seen.repeat(query.shape[1] // kv_heads, 1)
        out = scaled_dot_product_attention(grouped, key, value, attn_mask=mask, scale=scale)
        return out.unflatten(2, (-1, tokens)).flatten(1, 2)
