"""What a compressed cache cannot do, found out before an engine starts. No torch, no vLLM.

`refuse` reads a model's config.json; `refuse_engine` reads what vLLM made of its arguments, and is called by the plugin
for every engine, so that `LLM(...)` with arguments that contradict the cache fails before a weight is loaded.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rltk.errors import ConfigError
from rltk.rollout.kv.options import KVOptions
from rltk.rollout.kv.settings import Settings


def refuse(
    options: KVOptions, context: int, model: str | Path | Mapping[str, Any], *,
    max_prompt: int | None = None, block_size: int = 16, tensor_parallel: int = 1,
) -> None:  # fmt: skip
    """Raise ConfigError if `options` cannot run a model at `context` tokens. A stock cache is never refused.

    model: its folder, or its config.json as a mapping. max_prompt: the longest prompt, which a share of the prompt
    is measured by. block_size: vLLM's (16 on a GPU, 32 on a CPU unless set).
    """
    if not options.compressed:
        return
    settings = Settings(options, context)
    refuse_model(options.name, model if isinstance(model, Mapping) else _read(Path(model)), settings.max_model_len)
    refuse_budget(settings, max_prompt, block_size)
    if tensor_parallel > 1 and options.heads == "shared":
        raise ConfigError(
            f"kv.heads=shared sums scores over all heads, which tensor_parallel={tensor_parallel} spreads over "
            "processes. Fix: kv.heads=per_kv_head."
        )


def refuse_budget(settings: Settings, max_prompt: int | None, block_size: int) -> None:
    """A budget below sinks + one block, or one that leaves a policy nothing to give up."""
    options, policy = settings.options, settings.policy
    if policy.evicts or options.budget >= 1:
        slots, whole = options.slots(settings.context), f"the context of {settings.context}"
    elif max_prompt is None:
        return  # a share of prompts of any length
    else:
        slots, whole = options.slots(max_prompt), f"the longest prompt of {max_prompt}"
    share = f" ({options.budget:g} of {whole})" if options.budget < 1 else ""
    if slots < options.sinks + block_size:
        raise ConfigError(
            f"kv.budget={slots} tokens{share} is below kv.sinks={options.sinks} + one block of {block_size}: nearly "
            f"nothing could be chosen. Fix: kv.budget={options.sinks + block_size} or more."
        )


def refuse_model(name: str, config: Mapping[str, Any], length: int) -> None:
    """Models whose cache is not one full-attention cache of plain keys and values in every layer."""
    config = config.get("text_config") or config
    reason = None
    kinds = {str(kind) for kind in config.get("layer_types") or ()} - {"full_attention"}
    window = config.get("sliding_window")
    if kinds:
        reason = f"has layers of {', '.join(sorted(kinds))}"
    elif window and config.get("use_sliding_window", True):
        reason = f"has a sliding window of {window}"
    elif config.get("kv_lora_rank"):
        reason = "has multi-head latent attention, whose cache has no keys and values to choose from"
    elif config.get("is_encoder_decoder"):
        reason = "is an encoder-decoder"
    elif config.get("attention_chunk_size"):
        reason = "attends within chunks"
    elif any(config.get(key) for key in ("ssm_cfg", "mamba_d_state", "linear_num_value_heads", "attn_type_list")):
        reason = "is a hybrid: not every layer has a cache of keys and values"
    if reason:
        raise ConfigError(f"kv={name} needs full attention in every layer, and this model {reason}. Fix: kv=full.")
    longest, rope = config.get("max_position_embeddings"), config.get("rope_scaling") or config.get("rope_parameters")
    scaled = isinstance(rope, Mapping) and rope.get("rope_type", rope.get("type", "default")) != "default"
    if longest and length > longest and not scaled:  # how far a scaled one reaches is for vLLM to say
        raise ConfigError(
            f"kv={name} needs {length} positions (dapq's pseudo tokens among them), the model has {longest}. "
            f"Fix: a context at least {length - longest} tokens shorter."
        )


def refuse_engine(settings: Settings, vllm_config: Any) -> None:
    """Raise ConfigError for vLLM settings that a compressed cache cannot work under."""
    name, cache, scheduler = settings.options.name, vllm_config.cache_config, vllm_config.scheduler_config
    model, parallel = vllm_config.model_config, vllm_config.parallel_config
    length = model.max_model_len
    wrong = None
    if cache.enable_prefix_caching:
        wrong = "prefix caching: a block's keys depend on what was evicted", "enable_prefix_caching=False"
    elif scheduler.enable_chunked_prefill:
        wrong = "chunked prefill: a prompt is compressed whole", "enable_chunked_prefill=False"
    elif scheduler.max_num_batched_tokens < length:
        wrong = (
            f"max_num_batched_tokens={scheduler.max_num_batched_tokens}: a prompt of up to {length} tokens is computed "
            "whole", f"max_num_batched_tokens={length}",
        )  # fmt: skip
    elif vllm_config.speculative_config is not None:
        wrong = "speculative decoding: a rejected token cannot be taken out again", "speculative_config=None"
    elif length > settings.max_model_len:
        wrong = f"max_model_len={length}", f"max_model_len={settings.max_model_len}, or a longer context for the cache"
    elif str(cache.cache_dtype) not in ("auto", "bfloat16", "float16"):
        wrong = f"kv_cache_dtype={cache.cache_dtype}: slots hold the model's own precision", "kv_cache_dtype='auto'"
    elif parallel.pipeline_parallel_size > 1:
        wrong = "pipeline parallelism (never tried)", "pipeline_parallel_size=1"
    elif getattr(parallel, "decode_context_parallel_size", 1) > 1:
        wrong = "context parallelism: a request's slots lie on one device", "decode_context_parallel_size=1"
    elif parallel.tensor_parallel_size > 1 and settings.options.heads == "shared":
        wrong = "heads='shared' under tensor parallelism: scores are summed over all heads", "heads='per_kv_head'"
    elif parallel.use_ubatching:
        wrong = "batches split in two: each half would keep a state of its own", "enable_dbo=False"
    elif vllm_config.kv_transfer_config is not None:
        wrong = "KV transfer: the blocks alone do not say which tokens they hold", "kv_transfer_config=None"
    if wrong:
        raise ConfigError(f"kv={name} cannot work with {wrong[0]}. Fix: {wrong[1]}.")
    if model.use_mla or model.is_hybrid:
        raise ConfigError(f"kv={name} needs full attention in every layer; this model is hybrid or MLA. Fix: kv=full.")
    refuse_model(name, model.hf_text_config.to_dict(), length)
    refuse_budget(settings, None, cache.block_size or 16)


def _read(folder: Path) -> Mapping[str, Any]:
    file = folder / "config.json"
    try:
        return json.loads(file.read_text())
    except (OSError, ValueError) as error:
        raise ConfigError(f"no usable model config at {file}: {error}") from error
