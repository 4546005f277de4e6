"""dapq's pseudo tokens: put in by the engine core, known again by the attention backend.

    the client sends       t0 ... t(P-2) t(P-1)
    the engine computes    t0 ... t(P-2)  x0 ... x(N-1)  t(P-1)       the prompt's last row samples the first token
    at positions           0  ... P-2     P  ... P+N-1   P-1          rewritten in place by the backend (backend.py)
    and as attention       t0 ... t(P-1)  x0 ... x(N-1)               rows permuted; the pseudo tokens' K/V is dropped

Their content does not matter (arXiv 2603.11564): ids spread over the vocabulary, so that no real prompt holds them in
this order. A request for prompt log-probs is left alone: its rows must be the prompt's own.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from rltk.rollout.kv.settings import Settings


def pseudo_ids(count: int, vocabulary: int) -> list[int]:
    """`count` ids, evenly spread."""
    return [(2 * i + 1) * vocabulary // (2 * count) for i in range(count)]


def wrap_prompt(prompt: Sequence[int], ids: Sequence[int]) -> list[int]:
    return [*prompt[:-1], *ids, *prompt[-1:]]


def is_wrapped(prompt: Sequence[int], ids: Sequence[int]) -> bool:
    return len(prompt) > len(ids) and list(prompt[-1 - len(ids) : -1]) == list(ids)


def check_request(settings: Settings, request: Any) -> None:
    """Raise ValueError for what the cache cannot serve, before the front end takes on `request` (EngineCoreRequest)."""
    name, params, prompt = settings.options.name, request.sampling_params, request.prompt_token_ids
    if params is None or prompt is None or request.prompt_embeds is not None:
        raise ValueError(f"kv={name} takes token prompts to generate from: no embeddings, no pooling")
    if request.resumable:
        raise ValueError(f"kv={name} compresses a prompt once: no streamed prompts")
    if not settings.pseudo:
        return
    if len(prompt) > settings.context:
        raise ValueError(f"a prompt of {len(prompt)} tokens is over the cache's context of {settings.context}")
    if params.prompt_logprobs is not None and params.max_tokens != 1:
        raise ValueError(f"kv={name} gives prompt log-probs without its pseudo tokens: ask for them with max_tokens=1")
    if params.min_tokens or params.repetition_penalty != 1:
        raise ValueError(
            f"kv={name} has vLLM see its pseudo tokens in the prompt: min_tokens and repetition_penalty would count "
            "them. Leave both out."
        )


def wrapped(settings: Settings, params: Any) -> bool:
    """Whether a request's prompt gets pseudo tokens."""
    return bool(settings.pseudo) and params.prompt_logprobs is None
