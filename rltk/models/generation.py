"""The generation config that a model comes with: what to keep of it, and what would be in the way."""

from __future__ import annotations

from typing import Any

from transformers import GenerationConfig


def plain(own: GenerationConfig, **sampling: Any) -> GenerationConfig:
    """Which tokens begin, end and pad, as `own` has them, and `sampling`: no penalties, lengths or truncation."""
    tokens = {key: getattr(own, key) for key in ("bos_token_id", "eos_token_id", "pad_token_id")}
    return GenerationConfig(**tokens | sampling)


def savable(own: GenerationConfig) -> GenerationConfig:
    """`own`, or a plain one where transformers would refuse to save it. It loads some that it does not save, such as a
    temperature without do_sample (Vicuna's); and a model is saved when all the training is done."""
    try:
        own.validate(strict=True)
    except ValueError:
        return plain(own)
    return own
