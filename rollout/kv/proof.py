"""Proof, before a token is sampled, that the cache is compressed in every process of an engine."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from rltk.errors import RltkError
from rltk.rollout.kv import versions
from rltk.rollout.kv.options import KVOptions
from rltk.rollout.kv.settings import Settings


@dataclass(frozen=True)
class Active:
    """What runs. blocks: usable ones of the pool; cap_blocks: of the longest request; concurrency: of such requests."""

    runner: str  # V1 | V2
    workers: int
    layers: int
    block_size: int
    blocks: int
    cap_blocks: int
    concurrency: int


def core_report(core: Any) -> dict[str, Any]:
    """EngineCore.rltk_kv_core: the scheduler's side."""
    manager, *others = core.scheduler.kv_cache_manager.coordinator.single_type_managers
    spec = manager.kv_cache_spec
    names = [type(m).__name__ for m in (manager, *others)]
    report = {"managers": names, "settings": getattr(spec, "compression", None)}
    if hasattr(manager, "plans"):
        slots, usable = manager.settings.most_slots, manager.usable
        report.update(
            blocks=usable, block_size=spec.block_size, cap_blocks=spec.blocks(slots), most_blocks=manager.most_blocks,
            max_num_seqs=core.vllm_config.scheduler_config.max_num_seqs, runner=versions.runner(core.vllm_config),
        )  # fmt: skip
    return report


def worker_report(worker: Any) -> dict[str, Any]:
    """Worker.rltk_kv_worker: every layer's attention and cache."""
    from rltk.rollout.kv.memory import memory_of

    memory = memory_of(worker)
    layers = worker.vllm_config.compilation_config.static_forward_context
    return {
        "settings": memory.settings.to_json(),
        "layers": len(memory.layers),
        "uncompressed": sorted(n for n in set(layers) - set(memory.layers) if hasattr(layers[n], "get_kv_cache_spec")),
        "attention": sorted({type(layers[name].impl).__name__ for name in memory.layers}),
        "blocks": memory.blocks - 1,
    }


def prove_active(engine: Any, options: KVOptions) -> Active | None:
    """Raise RltkError unless every process of `engine` (LLM, LLMEngine, RolloutEngine) runs the cache that `options`
    names: scheduler's manager, every worker's attention layers, one size of pool. None for a stock cache, which must
    then be stock everywhere.
    """
    engine = versions.engine_of(engine)
    if not options.compressed:
        if Settings.of(engine.vllm_config) is not None:
            raise RltkError(f"kv={options.name}, but the engine was started with a compressed cache")
        return None
    try:
        core, workers = versions.core_call(engine, "rltk_kv_core"), engine.collective_rpc("rltk_kv_worker")
    except RltkError:
        raise
    except Exception as error:
        raise RltkError(
            f"kv={options.name}, but a process of the engine has not loaded the vLLM plugin rltk_kv, and its cache "
            f"would be full ({type(error).__name__}: {error}). Fix: install the package, and name rltk_kv in "
            "VLLM_PLUGINS if that is set."
        ) from error
    if core["managers"] != ["CompressedManager"]:
        raise RltkError(f"kv={options.name}, but the scheduler's blocks are managed by {', '.join(core['managers'])}")
    wanted = Settings(options, Settings.of(engine.vllm_config).context).to_json()
    if core["settings"] != wanted:
        raise RltkError(f"the scheduler runs {core['settings']}, not {wanted}")
    for rank, worker in enumerate(workers):
        if worker["settings"] != wanted or worker["attention"] != ["CompressedAttention"] or worker["uncompressed"]:
            raise RltkError(f"worker {rank} does not run kv={options.name} in every layer: {worker}")
        if worker["blocks"] != core["blocks"]:
            raise RltkError(f"worker {rank} has {worker['blocks']} blocks, the scheduler {core['blocks']}")
    if core["blocks"] < core["cap_blocks"]:
        raise RltkError(
            f"{core['blocks']} blocks of {core['block_size']} tokens do not hold one sequence at its cap of "
            f"{core['cap_blocks']} blocks. Fix: more memory for the cache, a smaller budget, or a shorter context."
        )
    concurrency = min(core["max_num_seqs"], core["blocks"] // core["cap_blocks"])
    pool = {name: core[name] for name in ("runner", "block_size", "blocks", "cap_blocks")}
    return Active(workers=len(workers), layers=workers[0]["layers"], concurrency=concurrency, **pool)
