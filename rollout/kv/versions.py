"""Every difference between the vLLM versions that this runs on (0.26 on CUDA, 0.32 on a CPU), told by what is there.

And between their devices: which kernels serve which.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch


def page_layouts() -> Any:
    """The cache layout [block, head, slot, content] by name; 0.26 asks for a shape instead and never calls this."""
    from vllm.v1.kv_cache_interface import KVCacheLayout

    return (KVCacheLayout.LBHNC,)


def on_gpu() -> bool:
    from vllm.platforms import current_platform

    return current_platform.is_cuda()


@functools.cache
def kernel(name: str, cuda: bool) -> Callable[..., Any]:
    """`decode` or `prompt_scores`: by Triton on a GPU, the torch reference on a CPU."""
    if name == "decode":
        if cuda:
            from rltk.kernels.decode import decode
        else:
            from rltk.kernels.decode_reference import decode
        return decode
    if cuda:
        from rltk.kernels.prompt_scores import prompt_scores
    else:
        from rltk.kernels.prompt_scores_reference import prompt_scores
    return prompt_scores


@functools.cache
def flash_attention(dtype: torch.dtype, head_size: int, cuda: bool) -> Callable[..., Any] | None:
    """vLLM's varlen FlashAttention in the version that it prefers here; None where there is none (CPU, fp32)."""
    if not cuda or dtype not in (torch.bfloat16, torch.float16) or head_size % 8 or head_size > 256:
        return None
    from vllm.v1.attention.backends.fa_utils import get_flash_attn_version
    from vllm.vllm_flash_attn import flash_attn_varlen_func

    version = get_flash_attn_version(head_size=head_size)
    return None if version is None else functools.partial(flash_attn_varlen_func, fa_version=version)


def runner(vllm_config: Any) -> str:
    """V1 | V2: which model runner vLLM takes."""
    return "V2" if getattr(vllm_config, "use_v2_model_runner", False) else "V1"


def engine_of(engine: Any) -> Any:
    """The LLMEngine of an LLM, of a RolloutEngine, or itself."""
    for name in ("llm_engine", "_engine"):
        engine = getattr(engine, name, engine)
    return engine


def core_call(engine: Any, method: str) -> Any:
    """Call a method of the EngineCore, in this process or in the engine's own."""
    client = engine_of(engine).engine_core
    if hasattr(client, "call_utility"):
        return client.call_utility(method)
    return getattr(client.engine_core, method)()


def external_id(internal: str) -> str:
    """The id a request was added under: vLLM appends `-` and eight characters of its own."""
    head, dash, tail = internal.rpartition("-")
    return head if dash and len(tail) == 8 else internal
