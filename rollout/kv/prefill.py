"""Prompts: attention among their own keys, then the keys that the policy chooses go into the request's slots.

A prompt within its budget is stored as it is, all such prompts of a batch in one write a layer; one over it is scored
and cut, a request at a time.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from rltk.kernels.state import DecodeState
from rltk.rollout.kv import versions
from rltk.rollout.kv.settings import Settings

if TYPE_CHECKING:
    from rltk.rollout.kv.memory import Memory


@dataclass(frozen=True)
class Prompt:
    """One prompt of the batch. start: its first token in the batch; at: in the prompts' own order; first: its block."""

    start: int
    at: int
    length: int  # real tokens
    pseudo: int
    kept: int
    first: int
    blocks: Tensor  # int64 [kept]: of slots 0 .. kept - 1
    offsets: Tensor  # int64 [kept]


@dataclass
class Prefill:
    """A batch's prompts. order: the batch's token at each place of their own order (real tokens, then pseudo ones),
    int64 [T] or, where that is the batch's, a slice; starts: int32 [n + 1], where prompts begin in it. stored, blocks,
    offsets: the tokens (in that order) of prompts that are stored whole, and their slots. kept: what each layer chose,
    by layer and prompt."""

    prompts: list[Prompt]
    order: Tensor | slice
    starts: Tensor
    longest: int
    stored: Tensor
    blocks: Tensor
    offsets: Tensor
    kept: dict[str, dict[int, Tensor]] = field(default_factory=dict)

    @classmethod
    def plan(cls, rows: list[tuple[int, int, int]], firsts: list[int], tables: Tensor, memory: Memory) -> Prefill:
        """rows: (start, tokens with pseudo ones, pseudo tokens) of each prompt; tables [n, MB]: their blocks.

        Sets `dropped` for them: the block's last owner left its own.
        """
        device, page = tables.device, memory.block_size
        prompts, order, starts, stored = [], [], [0], []
        for number, (start, tokens, pseudo) in enumerate(rows):
            length, at = tokens - pseudo, starts[-1]
            kept = memory.settings.kept(length)
            slots = torch.arange(kept, device=device)
            blocks = tables[number].long()[slots // page]
            prompts.append(Prompt(start, at, length, pseudo, kept, firsts[number], blocks, slots % page))
            last = start + tokens - 1  # the real prompt's last token stands behind the pseudo ones
            order += [*range(start, start + length - 1), last, *range(start + length - 1, last)]
            starts.append(at + tokens)
            if kept == length:
                stored += range(at, at + length)
        whole = [p for p in prompts if p.kept == p.length]
        dropped = [p.length + p.pseudo - p.kept for p in prompts]
        memory.dropped[tables[:, 0].long()] = torch.tensor(dropped, dtype=torch.int32, device=device)
        none = torch.zeros(0, dtype=torch.long, device=device)
        as_they_stand = order == list(range(order[0], order[0] + len(order)))
        return cls(
            prompts,
            slice(order[0], order[0] + len(order)) if as_they_stand else torch.tensor(order, device=device),
            torch.tensor(starts, dtype=torch.int32, device=device),
            max(p.length + p.pseudo for p in prompts),
            torch.tensor(stored, dtype=torch.long, device=device),
            torch.cat([p.blocks for p in whole]) if whole else none,
            torch.cat([p.offsets for p in whole]) if whole else none,
        )


def prefill(
    query: Tensor, key: Tensor, value: Tensor, cache: Tensor, state: DecodeState, plan: Prefill, settings: Settings,
    scale: float, output: Tensor,
) -> dict[int, Tensor]:  # fmt: skip
    """One layer. query, output [T, Hq, D]; key, value [T, Hkv, D]. Returns the tokens that each cut prompt (by its
    first block) kept: int64 [Hv, kept]."""
    q, k, v = query[plan.order], key[plan.order], value[plan.order]
    output[plan.order] = causal_attention(q, k, v, plan, scale)
    if len(plan.stored):
        cache[plan.blocks, :, plan.offsets] = torch.cat((k, v), -1)[plan.stored]
    prompt_scores, policy, options = versions.kernel("prompt_scores", key.is_cuda), settings.policy, settings.options
    shared, kept = options.heads == "shared", {}
    for prompt in plan.prompts:
        cut = prompt.kept < prompt.length
        if not cut and state.acc is None and state.slot_pos is None:
            continue
        here = slice(prompt.at, prompt.at + prompt.length + prompt.pseudo)
        tokens = torch.arange(prompt.kept, device=key.device)[None]
        if cut or state.acc is not None:
            scores = policy.scores(q[here], k[here], prompt.length, scale, prompt_scores)
        if cut:
            tokens = kept[prompt.first] = policy.choose(scores, prompt.kept, options.sinks, shared)
        tokens = tokens.expand(k.shape[1], -1)  # [Hkv, kept]
        at = (prompt.blocks, slice(None), prompt.offsets)  # gives [kept, Hkv, ...]
        if cut:
            pages = torch.cat((k[here], v[here]), -1).transpose(0, 1)  # [Hkv, tokens, 2D]
            cache[at] = pages.gather(1, tokens[..., None].expand(-1, -1, pages.shape[2])).transpose(0, 1)
        if state.slot_pos is not None:
            state.slot_pos[at] = tokens.T.to(torch.int32)
        if state.acc is not None:
            state.acc[at] = scores.gather(1, tokens).T.to(state.acc.dtype)
    return kept


def causal_attention(query: Tensor, key: Tensor, value: Tensor, plan: Prefill, scale: float) -> Tensor:
    """[T, Hq, D]: every prompt over its own tokens. FlashAttention where it runs, else PyTorch's, prompt by prompt."""
    flash = versions.flash_attention(query.dtype, query.shape[2], query.is_cuda)
    if flash is not None:
        return flash(
            query, key, value, max_seqlen_q=plan.longest, cu_seqlens_q=plan.starts, max_seqlen_k=plan.longest,
            cu_seqlens_k=plan.starts, softmax_scale=scale, causal=True,
        )  # fmt: skip
    groups, output = query.shape[1] // key.shape[1], torch.empty_like(query)
    for prompt in plan.prompts:
        here = slice(prompt.at, prompt.at + prompt.length + prompt.pseudo)
        q, k, v = (tensor[here].transpose(0, 1)[None] for tensor in (query, key, value))
        k, v = k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)
        output[here] = scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale)[0].transpose(0, 1)
    return output


def rewrite_positions(positions: Tensor, pseudo: int, step: Any) -> None:
    """dapq: the positions that the model reads, in vLLM's own buffer, which it fills anew every step. Pseudo tokens
    stand behind the prompt's last token; what is sampled goes on from there as if they had never been."""
    decode = step.decode
    if decode is not None:
        tokens = slice(decode.rows) if decode.tokens is None else decode.tokens
        # Rows that only pad a graph, and warm-ups without pseudo tokens, may stand anywhere.
        positions[tokens] = (positions[tokens] - pseudo).clamp(min=0)
    if step.prefill is None:
        return
    device = positions.device
    for prompt in step.prefill.prompts:
        if prompt.pseudo:
            start, length = prompt.start, prompt.length
            positions[start + length - 1 : start + length - 1 + prompt.pseudo] = torch.arange(
                length, length + prompt.pseudo, device=device, dtype=positions.dtype
            )
            positions[start + length - 1 + prompt.pseudo] = length - 1
