"""The plugin's entry point: vLLM calls `register` in every process (group `vllm.general_plugins`).

It may be called more than once, and does nothing to an engine whose additional_config has no `rltk_kv`: every function
that it puts itself around asks for the engine's settings first and passes through where there are none.

    process        around                                   to
    any            EngineArgs.create_engine_config          refuse arguments that contradict the cache
    front end      InputProcessor.process_inputs            refuse requests that it cannot serve
    engine core    EngineCore.preprocess_add_request        plan a request's slots, put dapq's pseudo tokens in
    worker         Attention.get_kv_cache_spec              give every layer a compressed spec
    worker         Worker.initialize_from_config            check that every layer has one
    worker         Worker.execute_model                     know which request owns which block; record evictions
    worker, CPU    CpuPlatform.get_attn_backend_cls         let the backend CUSTOM be chosen, as on a GPU
"""

from __future__ import annotations

import copy
import functools
import inspect
from collections.abc import Callable
from typing import Any

from rltk.errors import RltkError
from rltk.rollout.kv import pseudo, refusal
from rltk.rollout.kv.settings import Settings, compressed

registered = False


def register() -> None:
    global registered
    if registered:
        return
    from vllm.engine.arg_utils import EngineArgs
    from vllm.model_executor.layers.attention.attention import Attention
    from vllm.platforms import current_platform
    from vllm.v1.attention.backends.registry import AttentionBackendEnum, register_backend
    from vllm.v1.engine.core import EngineCore
    from vllm.v1.engine.input_processor import InputProcessor
    from vllm.v1.worker.gpu_worker import Worker

    register_backend(AttentionBackendEnum.CUSTOM, "rltk.rollout.kv.backend.CompressedBackend")
    if current_platform.is_cpu():
        _around(type(current_platform), "get_attn_backend_cls", _cpu_backend)
    _around(EngineArgs, "create_engine_config", _create_engine_config)
    _around(InputProcessor, "process_inputs", _process_inputs)
    _around(EngineCore, "preprocess_add_request", _preprocess_add_request)
    _around(Attention, "get_kv_cache_spec", _get_kv_cache_spec)
    _around(Worker, "initialize_from_config", _initialize_from_config)
    _around(Worker, "execute_model", _execute_model)

    from rltk.rollout.kv import proof, recorder

    EngineCore.rltk_kv_core = proof.core_report  # type: ignore[attr-defined]
    Worker.rltk_kv_worker = proof.worker_report  # type: ignore[attr-defined]
    Worker.rltk_kv_deaths = recorder.worker_deaths  # type: ignore[attr-defined]
    registered = True


def _around(owner: type, name: str, wrapper: Callable[..., Any]) -> None:
    """Put `wrapper(original, self, ...)` in the place of a method; of a classmethod it becomes one again."""
    kept = inspect.getattr_static(owner, name)
    original = kept.__func__ if isinstance(kept, classmethod) else kept

    @functools.wraps(original)
    def method(self: Any, *args: Any, **kwargs: Any) -> Any:
        return wrapper(functools.partial(original, self), self, *args, **kwargs)

    setattr(owner, name, classmethod(method) if isinstance(kept, classmethod) else method)


def _cpu_backend(original: Callable, cls: type, selected: Any, *args: Any, **kwargs: Any) -> str:
    from vllm.v1.attention.backends.registry import AttentionBackendEnum

    custom = selected is AttentionBackendEnum.CUSTOM
    return selected.get_path() if custom else original(selected, *args, **kwargs)


def _create_engine_config(original: Callable, engine_args: Any, *args: Any, **kwargs: Any) -> Any:
    vllm_config = original(*args, **kwargs)
    settings = Settings.of(vllm_config)
    if settings is not None:
        refusal.refuse_engine(settings, vllm_config)
    return vllm_config


def _process_inputs(original: Callable, processor: Any, *args: Any, **kwargs: Any) -> Any:
    request = original(*args, **kwargs)
    settings = Settings.of(processor.vllm_config)
    if settings is not None:
        from vllm.exceptions import VLLMValidationError  # which a server answers with 400

        try:
            pseudo.check_request(settings, request)
        except ValueError as error:
            raise VLLMValidationError(str(error)) from error
    return request


def _preprocess_add_request(original: Callable, core: Any, request: Any) -> Any:
    settings = Settings.of(core.vllm_config)
    if settings is not None:
        prompt, count = request.prompt_token_ids, 0
        if pseudo.wrapped(settings, request.sampling_params):
            count = settings.pseudo
            ids = pseudo.pseudo_ids(count, core.vllm_config.model_config.get_vocab_size())
            request = copy.copy(request)  # the front end's own keeps the prompt as it was sent
            request.prompt_token_ids = pseudo.wrap_prompt(prompt, ids)
        for manager in core.scheduler.kv_cache_manager.coordinator.single_type_managers:
            manager.expect(request.request_id, len(prompt), count, request.sampling_params.max_tokens)
    return original(request)


def _get_kv_cache_spec(original: Callable, layer: Any, vllm_config: Any) -> Any:
    spec, settings = original(vllm_config), Settings.of(vllm_config)
    if settings is None or spec is None:
        return spec
    from vllm.v1.kv_cache_interface import FullAttentionSpec

    from rltk.rollout.kv.spec import CompressedSpec

    if type(spec) is not FullAttentionSpec:
        raise RltkError(f"layer {layer.layer_name} has a cache of type {type(spec).__name__}: it cannot be compressed")
    return CompressedSpec.of(spec, settings)


def _initialize_from_config(original: Callable, worker: Any, kv_cache_config: Any) -> Any:
    if compressed(worker.vllm_config):
        from rltk.rollout.kv.spec import CompressedSpec

        kinds = [type(group.kv_cache_spec).__name__ for group in kv_cache_config.kv_cache_groups]
        if kinds != [CompressedSpec.__name__]:
            raise RltkError(f"this engine's KV cache should be compressed and is made of {', '.join(kinds)}")
    return original(kv_cache_config)


def _execute_model(original: Callable, worker: Any, scheduler_output: Any, *args: Any, **kwargs: Any) -> Any:
    if not compressed(worker.vllm_config):
        return original(scheduler_output, *args, **kwargs)
    from rltk.rollout.kv.memory import memory_of

    memory = memory_of(worker)
    memory.before_step(scheduler_output)
    output = original(scheduler_output, *args, **kwargs)
    memory.after_step()
    return output
