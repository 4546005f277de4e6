"""A transformers model whose attention keeps a compressed cache, by the code of the engine's plugin.

    prefill   every prompt attends to all of itself, once; each policy scores its keys (rollout/kv/policies)
    decode    for one policy, budget and choice of heads: the chosen keys go into slots, and each forced token runs
              through the decode kernel over them (kernels/: Triton on a GPU, the reference on a CPU); on a CPU, where
              what is evicted does not depend on what is decoded, all forced tokens run at once (bench/kv_at_once.py)

Prompts of one length make a batch, so one prefill serves every policy and budget; inside vLLM each would be an engine
of its own. The first token after a prompt is predicted by the prefill, with the whole cache, here as in the engine.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from bench.kv_at_once import AtOnce, foreseeable
from rltk.kernels.state import DecodeSettings, DecodeState
from rltk.rollout.kv.options import KVOptions
from rltk.rollout.kv.policies.policy import Policy
from rltk.rollout.kv.pseudo import pseudo_ids
from rltk.rollout.kv.settings import Settings

NAME = "rltk_kv_study"
PAGE = 32  # slots a block
PREFILL_TOKENS = 65_536  # at once: activations of 1.5 KB a token and layer


class Step(Protocol):
    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor: ...


class StudyModel:
    """A causal model in fp32. `policies` observe every prompt; all that ask for pseudo tokens share theirs."""

    def __init__(self, folder: str, policies: dict[str, Policy], device: str = "cpu", triton: bool = False) -> None:
        from transformers import AttentionInterface, AutoModelForCausalLM, AutoTokenizer
        from transformers.masking_utils import AttentionMaskInterface

        AttentionInterface.register(NAME, self._attention)
        AttentionMaskInterface.register(NAME, lambda *args, **kwargs: None)
        self.tokenizer = AutoTokenizer.from_pretrained(folder)
        self.model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation=NAME)
        self.model = self.model.to(device).eval()
        self.policies, self.device = policies, torch.device(device)
        if triton:
            from rltk.kernels.decode import decode
        else:
            from rltk.kernels.decode_reference import decode
        self.decode, self.at_once = decode, not triton
        counts = {policy.pseudo for policy in policies.values() if policy.pseudo}
        if len(counts) > 1:
            raise ValueError(f"policies with different numbers of pseudo tokens: {sorted(counts)}")
        self.pseudo = pseudo_ids(counts.pop(), self.model.config.vocab_size) if counts else []
        self._step: Step | None = None

    @torch.inference_mode()
    def prefill(self, prompts: Sequence[Sequence[int]]) -> Prompts:
        """Prompts of equal length -> their keys, values and every policy's scores; `logits` of their last tokens."""
        length = len(prompts[0])
        if any(len(prompt) != length for prompt in prompts):
            raise ValueError("the prompts of a batch must have one length")
        ids = torch.tensor([[*prompt, *self.pseudo] for prompt in prompts], device=self.device)
        positions = torch.arange(ids.shape[1], device=self.device)
        last = torch.tensor([length - 1], device=self.device)
        parts = []
        for some in ids.split(max(1, PREFILL_TOKENS // ids.shape[1])):
            part = Prompts(length, self.policies)
            part.logits = self._forward(part, some, positions.expand(len(some), -1), last)
            parts.append(part)
        return joined(parts)

    @torch.inference_mode()
    def continued(self, prompts: Prompts, options: KVOptions, answers: Sequence[Sequence[int]]) -> Tensor:
        """fp32 [B, A, V]: log-probs at each place of the answers (one length A), the tokens before it being forced.

        options: a policy's, its budget in tokens (of `prompts.length`), or `full`.
        """
        ids = torch.tensor([list(answer) for answer in answers], device=self.device)
        logits = [prompts.logits]
        if self.at_once and foreseeable(options):
            positions = prompts.length + torch.arange(ids.shape[1] - 1, device=self.device)
            whole = AtOnce(prompts, options, ids.shape[1])
            logits.append(self._forward(whole, ids[:, :-1], positions.expand(len(ids), -1), 0))
            return torch.cat(logits, 1).log_softmax(-1)
        step = Cache(prompts, options, len(answers[0]), self.decode)
        for number in range(ids.shape[1] - 1):
            step.advance()
            position = torch.full((len(ids), 1), prompts.length + number, device=self.device)
            logits.append(self._forward(step, ids[:, number : number + 1], position, 0))
        return torch.cat(logits, 1).log_softmax(-1)

    def _forward(self, step: Step, ids: Tensor, positions: Tensor, keep: Any) -> Tensor:
        self._step = step
        out = self.model(input_ids=ids, position_ids=positions, use_cache=False, logits_to_keep=keep)
        return out.logits.float()

    def _attention(self, module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Any, scaling: float, **_: Any):
        """query [B, Hq, T, D], key and value [B, Hkv, T, D] -> [B, T, Hq, D]."""
        assert self._step is not None
        return self._step.attend(module.layer_idx, query, key, value, scaling).transpose(1, 2), None


@dataclass
class Prompts:
    """Prefilled prompts. key, value: by layer, [B, Hkv, P, D]; scores: by policy and layer, [B, Hkv, P]."""

    length: int
    policies: dict[str, Policy]
    key: list[Tensor] = field(default_factory=list)
    value: list[Tensor] = field(default_factory=list)
    scores: dict[str, list[Tensor]] = field(default_factory=dict)
    scale: float = 0.0
    logits: Any = None

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
        from rltk.kernels.prompt_scores_reference import prompt_scores

        length, self.scale = self.length, scale
        self.key.append(key[:, :, :length])
        self.value.append(value[:, :, :length])
        for name, policy in self.policies.items():
            seen = length + policy.pseudo  # the pseudo tokens stand last, and only who asked for them sees them
            rows = [  # one at a time: a batch's attention would not fit
                policy.scores(q.transpose(1, 2), k.transpose(1, 2), length, scale, prompt_scores)
                for q, k in zip(query[:, :, :seen].split(1), key[:, :, :seen].split(1), strict=True)
            ]
            self.scores.setdefault(name, []).append(torch.cat(rows))
        # Repeated, not enable_gqa: in fp32 that would hold all of [T, T].
        key, value = (tensor.repeat_interleave(query.shape[1] // key.shape[1], 1) for tensor in (key, value))
        return scaled_dot_product_attention(query, key, value, is_causal=True, scale=scale)

    def chosen(self, layer: int, options: KVOptions, keep: int) -> Tensor:
        """int64 [B, 1 or Hkv, keep]: the tokens that have a slot of `keep`, ascending."""
        if keep == self.length:
            return torch.arange(keep, device=self.key[layer].device).expand(len(self.key[layer]), 1, -1)
        policy, shared = self.policies[options.name], options.heads == "shared"
        return policy.choose(self.scores[options.name][layer], keep, options.sinks, shared)


def joined(parts: list[Prompts]) -> Prompts:
    """Batches of prompts of one length as one. The parts are emptied on the way, layer by layer."""
    whole, first = Prompts(parts[0].length, parts[0].policies, scale=parts[0].scale), parts[0]
    whole.logits = torch.cat([part.logits for part in parts])
    for _ in range(len(first.key)):
        whole.key.append(torch.cat([part.key.pop(0) for part in parts]))
        whole.value.append(torch.cat([part.value.pop(0) for part in parts]))
    whole.scores = {
        name: [torch.cat(layer) for layer in zip(*(part.scores[name] for part in parts), strict=True)]
        for name in first.scores
    }
    return whole


class Cache:
    """The slots of one policy, budget and choice of heads for a batch of prompts, in every layer."""

    def __init__(self, prompts: Prompts, options: KVOptions, tokens: int, decode: Any) -> None:
        batch, kv_heads, length, _ = prompts.key[0].shape
        self.prompts, self.options, self._decode = prompts, options, decode
        settings = None if options.name == "full" else Settings(options, length + tokens)
        self.settings = settings
        keep = settings.kept(length) if settings else length
        held = settings.slots(length, tokens) if settings else length + tokens
        blocks = -(-held // PAGE)
        device = prompts.key[0].device
        # Block 0 is nobody's, as in vLLM; row b has blocks 1 + b * blocks and on.
        self.table = (1 + torch.arange(batch * blocks, device=device, dtype=torch.int32)).view(batch, blocks)
        self.lengths = torch.full((batch,), length, dtype=torch.int32, device=device)
        self.decode_settings = DecodeSettings(
            mode=settings.policy.mode if settings else "append",
            scale=prompts.scale,
            cap=settings.cap if settings else 1 << 30,
            sinks=options.sinks,
            recent=settings.policy.window(settings.cap, options.sinks) if options.name == "h2o" else 0,
        )
        self.pages: list[Tensor] = []
        self.states: list[DecodeState] = []
        for layer in range(len(prompts.key)):
            self._fill(layer, keep, 1 + batch * blocks, kv_heads)

    def _fill(self, layer: int, keep: int, blocks: int, kv_heads: int) -> None:
        key, value, name = self.prompts.key[layer], self.prompts.value[layer], self.options.name
        batch = len(key)
        state = DecodeState.allocate(
            self.decode_settings, blocks, kv_heads, PAGE, heads=self.options.heads, device=key.device
        )
        chosen = self.prompts.chosen(layer, self.options, keep).expand(-1, kv_heads, -1)  # [B, Hkv, keep]
        state.dropped[self.table[:, 0].long()] = self.prompts.length - keep
        pages = torch.zeros(blocks, kv_heads, PAGE, 2 * key.shape[3], device=key.device)
        slots = torch.arange(keep, device=key.device)
        block, offset = self.table.long()[:, slots // PAGE], (slots % PAGE).expand(batch, -1)  # [B, keep]
        held = torch.cat((key, value), -1).gather(2, chosen[..., None].expand(-1, -1, -1, pages.shape[3]))
        pages[block, :, offset] = held.transpose(1, 2)
        if state.slot_pos is not None:
            state.slot_pos[block, :, offset] = chosen.transpose(1, 2).to(torch.int32)
        if state.acc is not None:
            state.acc[block, :, offset] = self.prompts.scores[name][layer].gather(2, chosen).transpose(1, 2)
        self.pages.append(pages)
        self.states.append(state)

    def advance(self) -> None:
        self.lengths += 1

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
        q, k, v = (tensor[:, :, 0] for tensor in (query, key, value))
        out = torch.empty_like(q)
        self._decode(
            q, k, v, self.pages[layer], self.table, self.lengths, self.states[layer], self.decode_settings, out
        )
        return out[:, :, None]
