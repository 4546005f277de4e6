"""The engine arguments of a cache, for `EngineArgs`, `LLM(...)` and the command line of `vllm serve`."""

from __future__ import annotations

import json
import shlex
from typing import Any

from rltk.rollout.kv.options import KVOptions
from rltk.rollout.kv.settings import KEY, Settings

GUARD = "rltk.rollout.kv.guard.PluginLoaded"


def engine_args(options: KVOptions, context: int) -> dict[str, Any]:
    """Arguments of vLLM's `EngineArgs` or `LLM` for sequences of at most `context` tokens, prompt and response.

    {} for a full cache, kv_cache_dtype for fp8. Raises ConfigError for options that no cache can have.
    """
    if not options.compressed:
        return {"kv_cache_dtype": "fp8"} if options.name == "fp8" else {}
    settings = Settings(options, context)
    return {
        "additional_config": {KEY: settings.to_dict()},
        "attention_config": {"backend": "CUSTOM"},  # the plugin registers it
        "worker_extension_cls": GUARD,  # without the plugin the engine must not start
        "max_model_len": settings.max_model_len,
        "enable_prefix_caching": False,
        "enable_chunked_prefill": False,
        "max_num_batched_tokens": max(8192, settings.max_model_len),
    }


def serve_line(options: KVOptions, context: int) -> str:
    """The same as arguments of `vllm serve`."""
    words = []
    for name, value in engine_args(options, context).items():
        flag = "--" + name.replace("_", "-")
        if isinstance(value, bool):
            words.append(flag if value else "--no-" + flag[2:])
        else:
            words += [flag, shlex.quote(json.dumps(value) if isinstance(value, dict) else str(value))]
    return " ".join(words)
