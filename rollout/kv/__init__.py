"""Compressed KV caches inside stock vLLM: a plugin that neither forks nor patches it on disk.

    from rltk.rollout import kv

    options = kv.KVOptions(name="longflow", budget=1800)  # or 0.2: a share (options.py says of what)
    kv.refuse(options, context, model, max_prompt=..., block_size=...)  # ConfigError before anything starts; no vLLM
    llm = LLM(model, **kv.engine_args(options, context))  # or EngineArgs(model, **...)
    active = kv.prove_active(llm, options)  # RltkError unless every process compresses
    deaths = kv.take_death_times(llm, {uid: length})  # options.record: {uid: int32 [layers, heads, length]}

`engine_args` gives the arguments that the cache needs and no others: `max_model_len` (context, and for dapq its pseudo
tokens), `enable_prefix_caching=False`, `enable_chunked_prefill=False`, `max_num_batched_tokens`, `attention_config`,
`additional_config`, `worker_extension_cls`. A caller may raise `max_num_batched_tokens`, and may put an extension of
its own in place of `worker_extension_cls` if it calls `prove_active`. `full` gives {}, `fp8` gives kv_cache_dtype.

Prompts are sent as they are. dapq's pseudo tokens are put in by the engine core and dropped by the attention backend,
so `LLM(...)` and `vllm serve` need no change of any client: `python -m rltk.rollout.kv longflow budget=1800
context=4096` prints the arguments for `vllm serve`.

vLLM loads the plugin by its entry point, which an installed package has; where an engine lives in this process,
`kv.register()` before it starts does the same for a checkout that was never installed.

No request is ever preempted: it is admitted only when the block pool can hold it and every running one at their caps.
"""

from __future__ import annotations

from typing import Any

from rltk.rollout.kv.arguments import engine_args
from rltk.rollout.kv.options import KVOptions, policies
from rltk.rollout.kv.refusal import refuse
from rltk.rollout.kv.settings import Settings

__all__ = ["KVOptions", "Settings", "engine_args", "policies", "prove_active", "refuse", "register", "take_death_times"]


def __getattr__(name: str) -> Any:
    """What needs vLLM is imported when it is asked for: options are read where vLLM must not be."""
    if name == "register":
        from rltk.rollout.kv.plugin import register

        return register
    if name == "prove_active":
        from rltk.rollout.kv.proof import prove_active

        return prove_active
    if name == "take_death_times":
        from rltk.rollout.kv.recorder import take_death_times

        return take_death_times
    raise AttributeError(name)
