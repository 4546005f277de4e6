"""One arm of bench.kv_throughput, in a process of its own: an engine, its batches, what they took.

Engine and scheduler live in this process, so that a step can be timed and the scheduler's own counts read.
"""

from __future__ import annotations

import contextlib
import gc
import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from bench.kv_throughput_plan import PROFILED, WARM, Arm, Batch, Predicted, largest_batch, predict
from rltk.errors import RltkError
from rltk.files import write_json
from rltk.rollout import kv
from rltk.rollout.kv.versions import runner

MEMORY_SHARE = 0.9  # of the device's memory
BESIDE = 8 << 30  # bytes of it for weights, activations, CUDA graphs; the rest is every arm's cache
PREFILL_SECONDS, TIMED_SECONDS = 150, 30  # of a batch, at most; a batch that would pass the first is cut down
FEW = 6  # prompts of the warm-up
KERNEL = Path(__file__).parent / "results" / "longflow_kernel.json"
# Of a kernel's name, in this order (FlashAttention 3 is made of CUTLASS).
KINDS = {"attention": ("flash", "longflow_", "varlen"), "matmul": ("gemm", "nvjet", "cutlass", "splitk")}


def set_environment() -> None:
    """vLLM reads these when it is first imported."""
    os.environ.update(
        VLLM_ENABLE_V1_MULTIPROCESSING="0", VLLM_NO_USAGE_STATS="1", VLLM_CPU_OMP_THREADS_BIND="nobind",
        VLLM_USE_FLASHINFER_SAMPLER="0", VLLM_LOGGING_STREAM="ext://sys.stderr", HF_HUB_OFFLINE="1",
    )  # fmt: skip


class Running:
    """An engine with random weights, sized for `largest` and every batch below it that may come in its place."""

    def __init__(self, arm: Arm, largest: Batch, model: str, kv_bytes: int, gpu: bool) -> None:
        from vllm import EngineArgs
        from vllm.v1.engine.llm_engine import LLMEngine

        scale, count = arm.scale, len(largest.prompts)
        self.arm, self.count = arm, count
        self.sizes = sorted({max(1, count * eighths // 8) for eighths in range(4, 9)} | {min(scale.small, count)})
        kv.register()  # the checkout need not be installed
        arguments: dict[str, Any] = {
            "model": model, "load_format": "dummy", "skip_tokenizer_init": True, "generation_config": "vllm",
            "dtype": "bfloat16", "disable_log_stats": True, "enable_prefix_caching": False,
            "max_model_len": scale.context, "max_num_seqs": count, "kv_cache_memory_bytes": kv_bytes,
            **kv.engine_args(arm.options, scale.context),
            "max_num_batched_tokens": scale.batched_tokens, "block_size": arm.block_size,
        }  # fmt: skip
        if gpu:  # a graph for each batch that is timed; prompts gain nothing from graphs
            graphs = {"cudagraph_mode": "FULL_DECODE_ONLY", "cudagraph_capture_sizes": self.sizes}
            arguments |= {"gpu_memory_utilization": MEMORY_SHARE, "compilation_config": graphs}
        else:
            arguments["enforce_eager"] = True
        start = time.perf_counter()
        self.engine = LLMEngine.from_engine_args(EngineArgs(**arguments))
        kv.prove_active(self.engine, arm.options)
        self.start_s = time.perf_counter() - start
        self.scheduler = self.engine.engine_core.engine_core.scheduler  # type: ignore[attr-defined]
        self.pool = self.scheduler.kv_cache_manager.block_pool
        config, usable = self.engine.vllm_config, self.pool.num_gpu_blocks - 1
        if (usable, config.cache_config.block_size) != (arm.usable_blocks(kv_bytes), arm.block_size):
            raise RltkError(
                f"{arm.name}: {usable} blocks of {config.cache_config.block_size} tokens, the arithmetic says "
                f"{arm.usable_blocks(kv_bytes)} of {arm.block_size}"
            )
        self.about = {
            "runner": runner(config), "attention": self.engine.collective_rpc(backends)[0],
            "cudagraph_mode": config.compilation_config.cudagraph_mode.name, "block_size": arm.block_size,
            "async_scheduling": bool(config.scheduler_config.async_scheduling), "usable_blocks": usable,
            "kv_bytes": kv_bytes, "start_s": self.start_s,
        }  # fmt: skip
        self.served = 0

    @contextlib.contextmanager
    def prefilled(self, batch: Batch) -> Iterator[tuple[list[Any], float]]:
        """The batch's requests, all with their first token, and the seconds that took; they are gone afterwards."""
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        draw = np.random.default_rng(self.served)
        names = [f"r{self.served + number}" for number in range(len(batch.prompts))]
        self.served += len(names)
        for name, prompt, most in zip(names, batch.prompts, batch.responses, strict=True):
            params = SamplingParams(
                temperature=1.0, max_tokens=most, ignore_eos=True, detokenize=False,
                output_kind=RequestOutputKind.FINAL_ONLY,
            )  # fmt: skip
            ids = draw.integers(3, self.arm.scale.shape.vocabulary, prompt).tolist()
            self.engine.add_request(name, {"prompt_token_ids": ids}, params)
        requests = list(self.scheduler.requests.values())
        gc.collect()
        gc.freeze()  # millions of prompt tokens: looking through them would stop the engine for a while
        start = shown = time.perf_counter()
        while any(request.num_output_tokens == 0 for request in requests):
            self.engine.step()
            now = time.perf_counter()
            if now - start > 1.5 * PREFILL_SECONDS:
                raise RltkError(f"{self.arm.name}: {len(requests)} prompts are not in after {now - start:.0f} s")
            if now - shown > 15:
                shown, done = now, sum(request.num_output_tokens > 0 for request in requests)
                print(f"    {done} of {len(requests)} prompts in after {now - start:.0f} s", flush=True)
        yield requests, time.perf_counter() - start
        self.engine.abort_request(names)
        while self.scheduler.has_requests():
            self.engine.step()
        for _ in range(2):  # what was under way when they were aborted
            self.engine.step()

    def rate(self, mix: str) -> float:
        """Prompt tokens a second; the first batch compiles what is left to compile."""
        batch = Batch.of(self.arm, mix, min(FEW, self.count))
        taken = []
        for _ in range(2):
            with self.prefilled(batch) as (_, seconds):
                self._steps(WARM)
                taken.append(seconds)
        return sum(batch.prompts) / taken[-1]

    def _steps(self, count: int, limit: float = float("inf")) -> list[float]:
        """Seconds of each of `count` engine steps, of fewer if `limit` seconds pass."""
        times: list[float] = []
        last = start = time.perf_counter()
        while len(times) < count and last - start < limit:
            self.engine.step()
            now = time.perf_counter()
            times.append(now - last)
            last = now
        return times

    def measure(self, batch: Batch, predicted: Predicted, keep: Callable[[dict[str, Any]], None], gpu: bool) -> None:
        """Decode steps of the whole batch, `keep` being given what they took, and on a GPU once more with what its
        kernels took. Raises RltkError unless every sequence ran, once, in every step."""
        count, slots = len(batch.prompts), batch.slots(self.arm)
        with self.prefilled(batch) as (requests, prefill_s):
            self._steps(WARM)
            before = sum(request.num_output_tokens for request in requests)
            times = self._steps(self.arm.scale.steps, TIMED_SECONDS)
            tokens = sum(request.num_output_tokens for request in requests) - before
            running, waiting = len(self.scheduler.running), len(self.scheduler.waiting)
            preemptions = sum(request.num_preemptions for request in requests)
            if (tokens, running, waiting, preemptions) != (count * len(times), count, 0, 0):
                raise RltkError(
                    f"{self.arm.name}: {tokens} tokens in {len(times)} steps of {count} sequences, {running} running "
                    f"and {waiting} waiting at the end, {preemptions} preemptions"
                )
            seconds, step = sum(times), sum(times) / len(times)
            slot_bytes = self.arm.slot_bytes * self.arm.scale.shape.layers
            found = {
                "sequences": count, "tokens_per_s": tokens / seconds, "step_ms": 1e3 * step,
                "step_ms_median": 1e3 * statistics.median(times), "timed_steps": len(times), "timed_s": seconds,
                "mean_slots": slots / count, "kv_gb_per_s": slots * slot_bytes / (1e9 * step),
                "prefill_s": prefill_s, "prompt_tokens": sum(batch.prompts), "prefill_steps": batch.prefill_steps,
                "preemptions": preemptions, "free_blocks": self.pool.get_num_free_blocks(),
                # Of the sequences that the pool would hold if every slot of a block were used.
                "of_arithmetic": slots / (self.about["usable_blocks"] * self.arm.block_size),
                "predicted": {**predicted.to_dict(), "tokens_per_s": count / predicted.step},
                "over_predicted": step / predicted.step,
            }  # fmt: skip
            keep(found)
            if gpu:
                keep({**found, "spent": self._profile()})

    def _profile(self) -> dict[str, float]:
        """Milliseconds of a step that kernels of each kind take; what is left of `step_ms` is waiting."""
        import torch
        from torch.profiler import ProfilerActivity, profile

        with profile(activities=[ProfilerActivity.CUDA]) as found:
            self._steps(PROFILED)
            torch.cuda.synchronize()
        spent = dict.fromkeys([*KINDS, "other"], 0.0)
        for event in found.events() or ():
            if event.device_type.name == "CUDA":
                name = event.name.lower()
                kind = next((kind for kind, parts in KINDS.items() if any(part in name for part in parts)), "other")
                spent[kind] += 1e-3 * event.time_range.elapsed_us() / PROFILED
        return {f"{kind}_ms": milliseconds for kind, milliseconds in spent.items()}


def backends(worker: Any) -> list[str]:
    """The attention of a worker's layers."""
    return sorted({group.backend.get_name() for groups in worker.model_runner.attn_groups for group in groups})


def run(arm: Arm, mix: str, small: bool, into: Path) -> None:
    """Measure an arm's batches; `into` has what is known after each."""
    set_environment()
    import torch

    gpu = torch.cuda.is_available()
    kv_bytes = int(MEMORY_SHARE * torch.cuda.mem_get_info()[1]) - BESIDE if gpu else 1 << 20
    kernel = json.loads(KERNEL.read_text())["figures"]
    batch = largest_batch(arm, mix, kv_bytes)
    print(f"  {arm.name}: {len(batch.prompts)} sequences fit {kv_bytes / 2**30:.1f} GiB", flush=True)
    with tempfile.TemporaryDirectory() as model:
        write_json(Path(model) / "config.json", arm.scale.shape.config())
        running = Running(arm, batch, model, kv_bytes, gpu)
    hardware = torch.cuda.get_device_name() if gpu else "CPU"
    result: dict[str, Any] = {"arm": arm.name, "mix": mix, "hardware": hardware, **running.about, "batches": {}}
    result["fits"], result["cap"] = len(batch.prompts), None

    def measure(name: str, batch: Batch) -> None:
        def keep(found: dict[str, Any]) -> None:
            result["batches"][name] = found
            write_json(into, result)

        predicted = predict(arm, len(batch.prompts), batch.slots(arm), kernel)
        running.measure(batch, predicted, keep, gpu)
        found = result["batches"][name]
        print(
            f"  {arm.name}: {found['sequences']} sequences, prompts {found['prefill_s']:.0f} s, a step "
            f"{found['step_ms']:.2f} ms (predicted {1e3 * predicted.step:.2f}), {found['tokens_per_s']:.0f} tokens/s",
            flush=True,
        )

    rate = result["prompt_tokens_per_s"] = running.rate(mix)
    print(f"  {arm.name}: started in {running.start_s:.0f} s, {rate / 1e3:.0f}k prompt tokens/s", flush=True)
    if small and len(batch.prompts) > arm.scale.small:
        measure("small", Batch.of(arm, mix, arm.scale.small))
    for count in reversed(running.sizes):
        batch = Batch.of(arm, mix, count)
        # While prompts come in, those that are in decode: half of a whole step's time on average.
        decoding = batch.prefill_steps * predict(arm, count, batch.slots(arm), kernel).step / 2
        expected = sum(batch.prompts) / rate + decoding
        if not gpu or expected <= PREFILL_SECONDS or count == running.sizes[0]:
            break
        result["cap"] = f"{count} sequences would take {expected:.0f} s of prefill, over {PREFILL_SECONDS} s: fewer ran"
    measure("largest", batch)
