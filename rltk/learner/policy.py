"""The policy as the learner runs it: packed tokens in, log-probs of the sampled tokens out."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from rltk.algorithms.distributions import MEASURES, measure
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
        self,
        packed: Packed,
        also: Collection[str] = (),
        temperature: float | None = None,
        chunks: int | None = None,
        reference: Policy | None = None,
    ) -> dict[str, torch.Tensor]:
        """{"logprobs": fp32 [M] of softmax(logits / T) at the sampled tokens, ...} and what `also` names, detached.

        also: "entropy" (nats), "hellinger" and "forward_kl" of the whole distribution, and "ref", the log-probs of
        `reference`, each fp32 [M]; "hidden" [M, d], the states that predict the tokens, in the model's dtype.
        reference: the frozen policy that the last three of the first need; its head runs beside ours, chunk by chunk.
        chunks: in how many parts the head runs. Under ZeRO-3 every call of the head is a gather, so all ranks must
        make as many; None: as few as `head_chunk` allows.
        """
        hidden = self.hidden(packed)
        parts, scale = chunks or self.chunks(packed), 1.0 / (temperature or self.temperature)
        theirs: Sequence[torch.Tensor | None] = [None] * parts
        if reference is not None:
            with torch.no_grad():
                theirs = reference.hidden(packed).tensor_split(parts)
        found = []
        for part, target, their in zip(
            hidden.tensor_split(parts), packed.target.tensor_split(parts), theirs, strict=True
        ):
            arguments = (part, target, scale, also, reference, their)
            if torch.is_grad_enabled():
                found.append(checkpoint(self._head, *arguments, use_reentrant=False))
            else:
                found.append(self._head(*arguments))
        out = {name: torch.cat([part[name] for part in found]) for name in found[0]}
        return out | {"hidden": hidden.detach()} if "hidden" in also else out

    def hidden(self, packed: Packed) -> torch.Tensor:
        """[M, d]: the last hidden states, at the places that predict a sampled token."""
        states = self.model.base_model(  # type: ignore[operator]
            input_ids=packed.ids,
            position_ids=packed.positions,
            use_cache=False,
            packing=(packed.pad_index, packed.flat_index),
        ).last_hidden_state[0]
        return states.index_select(0, packed.predict)

    def chunks(self, packed: Packed) -> int:
        """Parts that the head needs for these tokens; at least one."""
        return max(1, -(-len(packed.predict) // self.head_chunk))

    def _head(
        self,
        hidden: torch.Tensor,
        target: torch.Tensor,
        scale: float,
        also: Collection[str],
        reference: Policy | None,
        theirs: torch.Tensor | None,
    ) -> dict[str, torch.Tensor]:
        new = self._distribution(hidden, scale)
        found = {"logprobs": new.gather(-1, target[:, None])[:, 0]}
        # Below the last thing that backward needs: there the checkpoint's second run stops, and measures nothing again.
        with torch.no_grad():
            ref = None if reference is None or theirs is None else reference._distribution(theirs, scale)
            if ref is not None and "ref" in also:
                found["ref"] = ref.gather(-1, target[:, None])[:, 0]
            return found | measure([name for name in MEASURES if name in also], new, ref)

    def _distribution(self, hidden: torch.Tensor, scale: float) -> torch.Tensor:
        """Log-probs fp32 [n, V] of softmax(logits / T)."""
        logits = self.model.get_output_embeddings()(hidden).float()  # type: ignore[operator]
        if self.softcap:
            logits = self.softcap * torch.tanh(logits / self.softcap)
        return (logits * scale).log_softmax(-1)


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
