"""Models that the learner cannot train, told by config.json before anything is loaded. No torch, no transformers."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from rltk.config import Config
from rltk.kv_size import QUESTION, context, lengths, trajectory_tokens
from rltk.model_folder import facts


def learner_problems(config: Config) -> Iterator[str]:
    """What rltk/learner/attention.py would refuse, or get wrong, once everything runs. The model's folder is sound."""
    model, file = facts(Path(config.model.path)), Path(config.model.path) / "config.json"
    learned = {key: tokens for key, tokens in lengths(config).items() if key != QUESTION}
    longest, response = trajectory_tokens(config), config.task.max_response_tokens
    total = f"{' + '.join(learned)} = {' + '.join(map(str, learned.values()))} = {longest}"
    if model.attention_cap is not None:
        yield (
            f"attn_logit_softcapping = {model.attention_cap:g} in {file}: the learner's attention has no such cap, so "
            "it would learn from wrong log-probs; choose another model"
        )
    if model.window is not None and model.window < longest:
        yield (
            f"sliding_window = {model.window} in {file}: the learner's attention sees the whole sequence, and {total} "
            f"tokens are more than the window; {_shorter(response + model.window - longest)}"
        )
    if model.short_rope is not None and model.short_rope < context(config):
        yield (
            f"original_max_position_embeddings = {model.short_rope} in {file}, of rope type longrope: an engine for "
            "longer sequences turns positions by its long factors, and the learner by those of the sequences at hand; "
            f"this run's engine holds {context(config)} tokens ({total}, and what the weight probe and DTSR ask); "
            f"{_shorter(response + model.short_rope - context(config))}"
        )


def _shorter(room: int) -> str:
    """`room`: tokens of a response that there is room for."""
    fix = f"lower task.max_response_tokens to {room}" if room > 0 else "lower task.max_prompt_tokens"
    return f"{fix}, or choose another model"
