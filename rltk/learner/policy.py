"""The policy as the learner runs it: packed tokens in, log-probs of the sampled tokens out."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from rltk.errors import ConfigError
from rltk.learner.attention import register
from rltk.learner.packing import Packed

HEAD_CHUNK = 2048  # tokens whose logits exist at once: 2048 x 152k x 4 bytes = 1.2 GB


class _Fp32Logits(torch.autograd.Function):
    """hidden [M, d] @ weight [V, d]^T with bf16 operands and fp32 results: a bf16 logit of 20 is rounded to 1/16."""

    @staticmethod
    def forward(ctx: Any, hidden: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(hidden, weight)
        if hidden.is_cuda:
            return torch.mm(hidden, weight.t(), out_dtype=torch.float32)
        return hidden.float() @ weight.float().t()

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        hidden, weight = ctx.saved_tensors
        grad = grads[0].to(weight.dtype)
        return grad @ weight, grad.t() @ hidden


def _use_fp32_logits(head: Any) -> None:
    """Replace the head's forward, not the module: ZeRO-3's hooks stay on it."""

    def forward(hidden: torch.Tensor) -> torch.Tensor:
        logits = _Fp32Logits.apply(hidden, head.weight)
        return logits if head.bias is None else logits + head.bias.float()

    head.forward = forward


class Policy(nn.Module):
    """A Hugging Face causal LM whose head is fused with the log-softmax, inside this module's forward.

    Inside, because ZeRO-3 gathers parameters by module hooks: the head is called as a module. Logits are made in fp32,
    chunk by chunk, and recomputed in backward: no `[tokens, vocabulary]` float tensor outlives a chunk.
    """

    def __init__(self, model: nn.Module, temperature: float, head_chunk: int = HEAD_CHUNK) -> None:
        super().__init__()
        self.model, self.temperature, self.head_chunk = model, temperature, head_chunk
        config: Any = model.config
        for name in ("logits_scaling", "logit_scale", "logits_scale"):
            if getattr(config, name, None) not in (None, 1, 1.0):
                raise ConfigError(
                    f"model {config.model_type!r} scales its logits ({name}); the learner does not know how"
                )
        head = model.get_output_embeddings()  # type: ignore[operator]
        if head.weight.dtype != torch.float32:
            _use_fp32_logits(head)
        self.softcap: float | None = getattr(config, "final_logit_softcapping", None)

    def forward(
        self, packed: Packed, entropy: bool = False, temperature: float | None = None, chunks: int | None = None
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Log-probs fp32 [M] of softmax(logits / T) at the sampled tokens; entropies fp32 [M] in nats, detached.

        `chunks`: in how many parts the head runs. Under ZeRO-3 every call of the head is a gather, so all ranks must
        make as many; None: as few as `head_chunk` allows.
        """
        hidden = self.model.base_model(
            input_ids=packed.ids,
            position_ids=packed.positions,
            use_cache=False,
            packing=(packed.pad_index, packed.flat_index),
        ).last_hidden_state[0]
        hidden = hidden.index_select(0, packed.predict)
        scale = 1.0 / (temperature or self.temperature)
        logprobs, entropies = [], []
        parts = chunks or self.chunks(packed)
        for part, target in zip(hidden.tensor_split(parts), packed.target.tensor_split(parts), strict=True):
            if torch.is_grad_enabled():
                logprob, part_entropy = checkpoint(self._head, part, target, scale, entropy, use_reentrant=False)
            else:
                logprob, part_entropy = self._head(part, target, scale, entropy)
            logprobs.append(logprob)
            entropies.append(part_entropy)
        return torch.cat(logprobs), torch.cat(entropies) if entropy else None

    def chunks(self, packed: Packed) -> int:
        """Parts that the head needs for these tokens; at least one."""
        return max(1, -(-len(packed.predict) // self.head_chunk))

    def _head(
        self, hidden: torch.Tensor, target: torch.Tensor, scale: float, entropy: bool
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        logits = self.model.get_output_embeddings()(hidden).float()
        if self.softcap:
            logits = self.softcap * torch.tanh(logits / self.softcap)
        logits = logits * scale
        norm = logits.logsumexp(-1)
        logprob = logits.gather(-1, target[:, None])[:, 0] - norm
        if not entropy:
            return logprob, None
        with torch.no_grad():
            return logprob, norm.detach() - (logits.softmax(-1) * logits).sum(-1)


def load_model(path: str, dtype: str, gradient_checkpointing: bool = False) -> nn.Module:
    """The Hugging Face model of a folder, with packed attention. dtype: float32 | bfloat16."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(path, dtype=getattr(torch, dtype), attn_implementation=register())
    model.config.use_cache = False
    if gradient_checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    model.train()  # gradient checkpointing needs train mode
    for module in model.modules():  # a log-prob must not depend on chance
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    return model
