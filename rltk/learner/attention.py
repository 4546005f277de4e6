"""Attention over packed sequences, registered with transformers under one name for every architecture.

The model runs on `[1, N]` tokens of many sequences laid end to end; only attention needs to know where each begins. It
gathers the flat tokens into padded rows, calls PyTorch's causal attention, and scatters back. Needs no flash-attn.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.nn.functional import scaled_dot_product_attention

NAME = "rltk_packed"


def register() -> str:
    """Make the implementation known to transformers; returns its name for `attn_implementation`."""
    from transformers import AttentionInterface
    from transformers.masking_utils import AttentionMaskInterface

    AttentionInterface.register(NAME, packed_attention)
    AttentionMaskInterface.register(NAME, lambda *args, **kwargs: None)  # causality is ours, no mask is built
    return NAME


def packed_attention(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    packing: tuple[torch.Tensor, torch.Tensor] | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """query [1, H, N, D], key and value [1, K, N, D] -> [1, N, H, D]. `packing`: pad_index [B, L], flat_index [N]."""
    if packing is None:
        raise ValueError("packed attention was called without `packing`: this model does not pass keyword arguments on")
    pad_index, flat_index = packing
    for name in ("softcap", "s_aux"):  # would be ignored below, and log-probs be wrong
        if kwargs.get(name) is not None:
            raise ValueError(f"this model's attention uses {name}, which the learner does not support")
    window = kwargs.get("sliding_window")
    if window is not None and window < pad_index.shape[1]:
        raise ValueError(f"sliding-window attention ({window} tokens) is not supported by the learner yet")

    def rows(flat: torch.Tensor) -> torch.Tensor:  # [1, H, N, D] -> [B, H, L, D]
        return flat[0].transpose(0, 1)[pad_index].transpose(1, 2)

    # Padding sits at the end of a row, so no real token attends to it and its own output is never read.
    out = scaled_dot_product_attention(
        rows(query), rows(key), rows(value), is_causal=True, scale=scaling, enable_gqa=query.shape[1] != key.shape[1]
    )
    return out.transpose(1, 2).flatten(0, 1)[flat_index][None], None
