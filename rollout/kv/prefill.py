"""Prompts: attention among their own keys, then the keys that the policy chooses go into the request's slots.

Prompts of one length are scored and cut together: the samples of a group have the same prompt, and a launch costs more
than a short prompt's work. A prompt within its budget is stored as it is, all such prompts of a batch in one write a
layer.
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
    """One prompt of the batch. start: its first token in the batch; first: its block."""

    start: int
    length: int  # real tokens
    pseudo: int
    first: int


@dataclass(frozen=True)
class Group:
    """Prompts of one length, one behind another in the plan's order from `at` on."""

    prompts: list[Prompt]
    at: int
    kept: int
    blocks: Tensor  # int64 [n, kept]: of slots 0 .. kept - 1
    offsets: Tensor  # int64 [kept]

    @property
    def length(self) -> int:
        return self.prompts[0].length

    @property
    def tokens(self) -> int:
        """Of each prompt, with its pseudo tokens."""
        return self.length + self.prompts[0].pseudo

    @property
    def cut(self) -> bool:
        return self.kept < self.length

    def of(self, tensor: Tensor) -> Tensor:
        """[n, tokens, ...] of a tensor in the plan's order: a view."""
        count = len(self.prompts)
        return tensor[self.at : self.at + count * self.tokens].unflatten(0, (count, self.tokens))


@dataclass
class Prefill:
    """A batch's prompts. order: the batch's token at each place of the plan's order (prompts by length, each with its
    real tokens, then its pseudo ones), int64 [T] or, where that is the batch's, a slice; starts: int32 [n + 1], where
    prompts begin in it. stored, blocks, offsets: the tokens (in that order) of prompts that are stored whole, and their
    slots. kept: what each layer chose of the groups that are cut, by layer and the group's number: int64
    [n, Hv, kept]."""

    groups: list[Group]
    order: Tensor | slice
    starts: Tensor
    longest: int
    stored: Tensor
    blocks: Tensor
    offsets: Tensor
    kept: dict[str, dict[int, Tensor]] = field(default_factory=dict)

    @property
    def prompts(self) -> list[Prompt]:
        return [prompt for group in self.groups for prompt in group.prompts]

    @classmethod
    def plan(cls, rows: list[tuple[int, int, int]], firsts: list[int], tables: Tensor, memory: Memory) -> Prefill:
        """rows: (start, tokens with pseudo ones, pseudo tokens) of each prompt; tables [n, MB]: their blocks.

        Sets `dropped` for them: the block's last owner left its own.
        """
        device, page, settings = tables.device, memory.block_size, memory.settings
        tables = tables.long()
        alike: dict[tuple[int, int], list[int]] = {}
        for number, (_, tokens, pseudo) in enumerate(rows):
            alike.setdefault((tokens - pseudo, pseudo), []).append(number)
        groups, order, starts, stored = [], [], [0], []
        for (length, pseudo), numbers in alike.items():
            kept, at = settings.kept(length), starts[-1]
            slots = torch.arange(kept, device=device)
            prompts = [Prompt(rows[number][0], length, pseudo, firsts[number]) for number in numbers]
            blocks = tables[torch.tensor(numbers, device=device)][:, slots // page]
            groups.append(Group(prompts, at, kept, blocks, slots % page))
            for prompt in prompts:
                start, last = prompt.start, prompt.start + length + pseudo - 1
                # the real prompt's last token stands behind the pseudo ones
                order += [*range(start, start + length - 1), last, *range(start + length - 1, last)]
                starts.append(starts[-1] + length + pseudo)
                if kept == length:
                    stored += range(starts[-2], starts[-2] + length)
        whole = [group for group in groups if not group.cut]
        dropped = [tokens - settings.kept(tokens - pseudo) for _, tokens, pseudo in rows]
        memory.dropped[tables[:, 0]] = torch.tensor(dropped, dtype=torch.int32, device=device)
        none = torch.zeros(0, dtype=torch.long, device=device)
        as_they_stand = order == list(range(order[0], order[0] + len(order)))
        return cls(
            groups,
            slice(order[0], order[0] + len(order)) if as_they_stand else torch.tensor(order, device=device),
            torch.tensor(starts, dtype=torch.int32, device=device),
            max(group.tokens for group in groups),
            torch.tensor(stored, dtype=torch.long, device=device),
            torch.cat([group.blocks.flatten() for group in whole]) if whole else none,
            torch.cat([group.offsets.repeat(len(group.prompts)) for group in whole]) if whole else none,
        )


def prefill(
    query: Tensor, key: Tensor, value: Tensor, cache: Tensor, state: DecodeState, plan: Prefill, settings: Settings,
    scale: float, output: Tensor,
) -> dict[int, Tensor]:  # fmt: skip
    """One layer. query, output [T, Hq, D]; key, value [T, Hkv, D]. Returns the tokens that the prompts of each cut
    group (by its number) kept: int64 [n, Hv, kept]."""
    q, k, v = query[plan.order], key[plan.order], value[plan.order]
    output[plan.order] = causal_attention(q, k, v, plan, scale)
    if len(plan.stored):
        cache[plan.blocks, :, plan.offsets] = torch.cat((k, v), -1)[plan.stored]
    prompt_scores, policy, options = versions.kernel("prompt_scores", key.is_cuda), settings.policy, settings.options
    shared, chosen = options.heads == "shared", {}
    for number, group in enumerate(plan.groups):
        if not group.cut and state.acc is None and state.slot_pos is None:
            continue
        if group.cut or state.acc is not None:
            scores = policy.scores(group.of(q), group.of(k), group.length, scale, prompt_scores)
        if group.cut:
            tokens = chosen[number] = policy.choose(scores, group.kept, options.sinks, shared)
        else:
            tokens = torch.arange(group.kept, device=key.device)[None, None]
        tokens = tokens.expand(len(group.prompts), k.shape[1], -1)  # [n, Hkv, kept]
        at = (group.blocks, slice(None), group.offsets)  # gives [n, kept, Hkv, ...]
        if group.cut:
            pages = torch.cat((group.of(k), group.of(v)), -1).transpose(1, 2)  # [n, Hkv, tokens, 2D]
            cache[at] = pages.gather(2, tokens[..., None].expand(-1, -1, -1, pages.shape[3])).transpose(1, 2)
        if state.slot_pos is not None:
            state.slot_pos[at] = tokens.transpose(1, 2).to(torch.int32)
        if state.acc is not None:
            state.acc[at] = scores.gather(2, tokens).transpose(1, 2).to(state.acc.dtype)
    return chosen


def causal_attention(query: Tensor, key: Tensor, value: Tensor, plan: Prefill, scale: float) -> Tensor:
    """[T, Hq, D]: every prompt over its own tokens. FlashAttention where it runs, else PyTorch's, group by group."""
    flash = versions.flash_attention(query.dtype, query.shape[2], query.is_cuda)
    if flash is not None:
        return flash(
            query, key, value, max_seqlen_q=plan.longest, cu_seqlens_q=plan.starts, max_seqlen_k=plan.longest,
            cu_seqlens_k=plan.starts, softmax_scale=scale, causal=True,
        )  # fmt: skip
    repeats, output = query.shape[1] // key.shape[1], torch.empty_like(query)
    for group in plan.groups:
        q, k, v = (group.of(tensor).transpose(1, 2) for tensor in (query, key, value))
        k, v = k.repeat_interleave(repeats, 1), v.repeat_interleave(repeats, 1)
        group.of(output)[:] = scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale).transpose(1, 2)
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
