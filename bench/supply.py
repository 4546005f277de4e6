"""What the learner spends on the fields of a `TokenBatch` that an objective may ask for, apart from the objective.

Its own pass (`rltk.learner.policy.Policy`) over the same tokens, once for the log-probs alone and once with each field;
the difference is what the field costs. Distributions are taken in chunks over the tokens, each over the whole
vocabulary; `hidden` goes to the host and back, as between the learner's two passes; `ref`, `hellinger` and
`forward_kl` run the frozen policy beside the own one.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from bench.cost import Work, costs
from rltk.learner.attention import register
from rltk.learner.packing import Packed, balance, micro_batches, pack
from rltk.learner.policy import Policy

FIELDS = ("ref", "entropy", "hellinger", "forward_kl", "hidden")
OF_FROZEN = ("ref", "hellinger", "forward_kl")


@dataclass(frozen=True)
class Shape:
    """Of a Llama with random weights. What a field costs depends on `vocabulary` and `width`."""

    name: str
    width: int
    layers: int
    heads: int
    key_value_heads: int
    intermediate: int
    vocabulary: int
    dtype: str
    tokens_per_micro_batch: int


SMOLLM2 = Shape("SmolLM2-135M", 576, 30, 9, 3, 1536, 49152, "bfloat16", 32768)
SMALL = Shape("small", 64, 1, 2, 2, 192, 256, "float32", 8192)


def supply(lengths: list[int], shape: Shape, device: torch.device, repeats: int) -> dict[str, Any]:
    """lengths: sampled tokens of each sequence. {"pass": {"ms", "mib"}, field: {"ms", "mib"} more than that, ...}."""
    policy, frozen = (_policy(shape, device, seed) for seed in (0, 1))
    packs = [packed.to(device) for packed in _packs(lengths, shape)]
    whole = pack([_row(n, shape.vocabulary) for n in lengths]).to(device)

    def work(field: str | None) -> Work:
        return lambda: _pass(policy, frozen if field in OF_FROZEN else None, packs, whole, field)

    works = {"pass": work(None)} | {field: work(field) for field in FIELDS}
    measured = costs(works, device, repeats)
    seconds, peak = measured["pass"]
    figures = {"pass": {"ms": 1e3 * seconds, "mib": peak / 2**20}}
    for field in FIELDS:
        of_field = measured[field]
        figures[field] = {"ms": 1e3 * (of_field[0] - seconds), "mib": (of_field[1] - peak) / 2**20}
    return figures


def frozen_mib(shape: Shape) -> float:
    """Weights of the frozen policy, which stand beside the own ones for as long as a run has a reference."""
    policy = _policy(shape, torch.device("meta"), 0)
    return sum(weight.numel() * weight.element_size() for weight in policy.parameters()) / 2**20


@torch.no_grad()
def _pass(policy: Policy, frozen: Policy | None, packs: list[Packed], whole: Packed, field: str | None) -> None:
    """The log-probs and one field of every sampled token, in tables `[b, T]` as an objective is handed them."""
    states = []
    for packed in packs:
        found = policy(packed, also=[field] if field else [], reference=frozen)
        if field == "hidden":
            states.append(found.pop("hidden").cpu())
        for value in found.values():
            packed.table(value)
    if states:
        whole.table(torch.cat(states).to(whole.ids.device))


def _policy(shape: Shape, device: torch.device, seed: int) -> Policy:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=shape.vocabulary, hidden_size=shape.width, intermediate_size=shape.intermediate,
        num_hidden_layers=shape.layers, num_attention_heads=shape.heads, num_key_value_heads=shape.key_value_heads,
        tie_word_embeddings=True, dtype=shape.dtype,
    )  # fmt: skip
    config._attn_implementation = register()
    with device:
        model = LlamaForCausalLM(config)
    return Policy(model.to(getattr(torch, shape.dtype)).requires_grad_(False), temperature=1.0)


def _packs(lengths: list[int], shape: Shape) -> list[Packed]:
    """Micro-batches as the learner cuts them."""
    sizes = np.asarray(lengths) + 1
    (order,) = balance(sizes, 1)
    parts = micro_batches(sizes, order, shape.tokens_per_micro_batch)
    return [pack([_row(lengths[i], shape.vocabulary) for i in part]) for part in parts]


def _row(length: int, vocabulary: int) -> tuple[np.ndarray, np.ndarray]:
    """One prompt token, then `length` sampled ones."""
    ids = np.random.default_rng(length).integers(0, vocabulary, length + 1)
    return ids, np.arange(length + 1) > 0
