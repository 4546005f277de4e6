"""Qwen3 with the weights of several runs stacked: every tensor has a leading dimension R, every product is batched.

R small models side by side keep a GPU as busy as one R times the size. The maths is transformers' own (a test compares
them); only the shapes are ours. Everything is float32, as in the real stack's default.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from rltk.errors import ConfigError

Weights = dict[str, Tensor]  # Hugging Face's names -> [R, *shape]
Attend = Callable[[int, Tensor, Tensor, Tensor], Tensor]  # layer, q [R, N, H, h], k, v [R, N, K, h] -> [R, N, H, h]


@dataclass(frozen=True)
class Shape:
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    eps: float
    theta: float
    vocabulary: int
    width: int

    @classmethod
    def of(cls, config: Any) -> Shape:
        """From transformers' Qwen3Config. ConfigError for another architecture, or an untied head."""
        if config.model_type != "qwen3" or not config.tie_word_embeddings or config.attention_bias:
            raise ConfigError(
                f"the lab knows Qwen3 models with a tied head; this one is {config.model_type!r}. "
                "Fix: lab.model=<folder of such a model>, or python -m rltk.train, which takes any."
            )
        rope = getattr(config, "rope_parameters", None) or {"rope_theta": config.rope_theta, "rope_type": "default"}
        if rope.get("rope_type", "default") != "default":
            raise ConfigError(f"the lab knows plain rotary positions, not {rope['rope_type']!r}")
        return cls(
            config.num_hidden_layers, config.num_attention_heads, config.num_key_value_heads, config.head_dim,
            config.rms_norm_eps, float(rope["rope_theta"]), config.vocab_size, config.hidden_size,
        )  # fmt: skip


def load(folder: str | Path, runs: int, device: torch.device) -> tuple[Shape, Weights]:
    """A model folder's weights, `runs` times, float32, as leaves that take gradient."""
    from safetensors.torch import load_file
    from transformers import AutoConfig

    shape = Shape.of(AutoConfig.from_pretrained(folder))
    weights = {}
    for name, value in load_file(Path(folder) / "model.safetensors").items():
        if name != "lm_head.weight":  # a tied head may be stored twice
            stacked = value.float().to(device).expand(runs, *value.shape).contiguous()
            weights[name] = stacked.requires_grad_()
    return shape, weights


def select(weights: Weights, runs: slice) -> Weights:
    """The weights of some of the runs; gradient flows back to the whole."""
    return {name: value[runs] for name, value in weights.items()}


def hidden_states(shape: Shape, weights: Weights, ids: Tensor, positions: Tensor, attend: Attend) -> Tensor:
    """Last hidden states [R, N, d] of tokens ids [R, N] at `positions` [R, N]; `attend` says who sees whom."""
    runs = torch.arange(ids.shape[0], device=ids.device)[:, None]
    x = weights["model.embed_tokens.weight"][runs, ids]
    cos, sin = _rotary(shape, positions)
    for layer in range(shape.layers):
        part = f"model.layers.{layer}."
        h = _norm(x, weights[f"{part}input_layernorm.weight"], shape.eps)
        q, k, v = (
            _linear(h, weights[f"{part}self_attn.{name}_proj.weight"]).unflatten(-1, (-1, shape.head_dim))
            for name in "qkv"
        )
        q = _turn(_norm(q, weights[f"{part}self_attn.q_norm.weight"], shape.eps), cos, sin)
        k = _turn(_norm(k, weights[f"{part}self_attn.k_norm.weight"], shape.eps), cos, sin)
        x = x + _linear(attend(layer, q, k, v).flatten(2), weights[f"{part}self_attn.o_proj.weight"])
        h = _norm(x, weights[f"{part}post_attention_layernorm.weight"], shape.eps)
        gate, up = (_linear(h, weights[f"{part}mlp.{name}_proj.weight"]) for name in ("gate", "up"))
        x = x + _linear(F.silu(gate) * up, weights[f"{part}mlp.down_proj.weight"])
    return _norm(x, weights["model.norm.weight"], shape.eps)


def logits(weights: Weights, hidden: Tensor) -> Tensor:
    """[R, N, d] -> [R, N, V], by the tied head."""
    return _linear(hidden, weights["model.embed_tokens.weight"])


def causal(rows: int) -> Attend:
    """Attention of `rows` sequences [R, rows * T] laid row by row; padding stands at the end, where nothing sees it."""

    def attend(_: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        runs, tokens, heads, dim = q.shape
        repeat = heads // k.shape[2]

        def split(x: Tensor) -> Tensor:  # [R * rows, heads, T, h]
            return x.reshape(runs * rows, tokens // rows, x.shape[2], dim).transpose(1, 2)

        k, v = (split(x).repeat_interleave(repeat, dim=1) for x in (k, v))
        out = F.scaled_dot_product_attention(split(q), k, v, is_causal=True)
        return out.transpose(1, 2).reshape(runs, tokens, heads, dim)

    return attend


def _linear(x: Tensor, weight: Tensor) -> Tensor:
    return torch.bmm(x, weight.mT)


def _norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """RMS norm over the last dimension; weight [R, dim]."""
    weight = weight.reshape(weight.shape[0], *[1] * (x.ndim - 2), weight.shape[-1])
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps) * weight


def _rotary(shape: Shape, positions: Tensor) -> tuple[Tensor, Tensor]:
    """cos and sin [R, N, 1, head_dim]."""
    half = torch.arange(0, shape.head_dim, 2, device=positions.device, dtype=torch.float32)
    angle = positions[..., None].float() * (1.0 / shape.theta ** (half / shape.head_dim))
    angle = torch.cat([angle, angle], dim=-1)[:, :, None]
    return angle.cos(), angle.sin()


def _turn(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    low, high = x.chunk(2, dim=-1)
    return x * cos + torch.cat([-high, low], dim=-1) * sin
