"""The throughput arm of bench.genrm_service: the same prompts through the service and through plain vLLM.

Both are given as many sequences, as much context and memory, and write replies of one length; each in a process of its
own, after a round of other prompts that is not timed. Plain vLLM is `LLM.generate` as it comes, in this process (the
faster of its two ways), all prompts in one call. The service is asked by eight clients, a question a call.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from bench.genrm_faults_plan import questions
from bench.genrm_parts import Lengthy, LongEngine, model_folder, start_ray, start_replica, start_service
from rltk.files import write_json
from rltk.rewards.genrm.backends import Chat
from rltk.rewards.genrm.client import GenRMClient
from rltk.rewards.genrm.options import GenRMOptions
from rltk.rewards.genrm.types import Question

CLIENTS = 8
WARM = 64  # prompts that are not timed
SIDES: dict[str, Callable[[argparse.Namespace], None]]


def run(arguments: argparse.Namespace, words: list[str], say: Callable[[str], None]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        for side in SIDES:
            into = Path(folder) / f"{side}.json"
            command = [sys.executable, "-m", "bench.genrm_service", *words, "--side", side, "--into", str(into)]
            subprocess.run(command, check=True, timeout=1800)
            found[side] = json.loads(into.read_text())
            rates = ", ".join(f"{rate:.0f}" for rate in found[side]["tokens_per_s"])
            say(f"{side:8} {rates} tokens/s; {found[side]['tokens']} tokens a round")
    if found["vllm"]["tokens"] != found["service"]["tokens"]:
        raise RuntimeError(f"the two sides did not write as much: {found}")
    ours, theirs = (statistics.median(found[side]["tokens_per_s"]) for side in ("service", "vllm"))
    return {
        "model": arguments.model, "device": arguments.device, "prompts": arguments.prompts,
        "tokens_each": arguments.tokens, "service_tokens_per_s": ours, "vllm_tokens_per_s": theirs,
        "throughput_over_vllm": ours / theirs, "rounds": found,
    }  # fmt: skip


def rounds(arguments: argparse.Namespace) -> list[list[Question]]:
    """The first is for warming up. No two ask the same, and no prefix cache helps one side alone."""
    made = questions(0, 2 * (WARM + arguments.prompts * arguments.repeats))
    kept = list({(q.problem, q.response): q for q in made}.values())[: WARM + arguments.prompts * arguments.repeats]
    sizes = [WARM, *[arguments.prompts] * arguments.repeats]
    starts = [sum(sizes[:number]) for number in range(len(sizes))]
    return [kept[start : start + size] for start, size in zip(starts, sizes, strict=True)]


def options_of(arguments: argparse.Namespace) -> GenRMOptions:
    gpu = arguments.device == "gpu"
    return GenRMOptions(
        name="bench", judge="bench.genrm_parts:Lengthy", model=model_folder(arguments.model),
        judge_options={"max_tokens": arguments.tokens}, dtype="bfloat16" if gpu else "float32",
        context=1024, max_sequences=arguments.sequences, kv_cache_gib=0.5, gpu_memory_share=0.5, enforce_eager=not gpu,
        threads=0 if gpu else 1, deadline_s=900.0, attempt_s=900.0, queue=max(arguments.prompts, WARM), cache=0,
    )  # fmt: skip


def report(arguments: argparse.Namespace, tokens: list[int], seconds: list[float]) -> None:
    """Of the timed rounds."""
    rates = [count / took for count, took in zip(tokens, seconds, strict=True)]
    write_json(arguments.into, {"tokens": tokens[0], "seconds": seconds, "tokens_per_s": rates})


def vllm_side(arguments: argparse.Namespace) -> None:
    options = options_of(arguments)
    os.environ.update(VLLM_ENABLE_V1_MULTIPROCESSING="0", VLLM_NO_USAGE_STATS="1", VLLM_LOGGING_LEVEL="ERROR",
                      VLLM_CPU_OMP_THREADS_BIND="nobind", VLLM_USE_FLASHINFER_SAMPLER="0")  # fmt: skip
    if options.threads:
        os.environ["OMP_NUM_THREADS"] = str(options.threads)
    from vllm import LLM, SamplingParams

    placed: dict[str, Any] = {"gpu_memory_utilization": options.gpu_memory_share}
    if arguments.device == "cpu":
        placed = {"kv_cache_memory_bytes": int(options.kv_cache_gib * 2**30), "block_size": 32}
    llm = LLM(model=options.model, dtype=options.dtype, max_model_len=options.context, seed=0, generation_config="vllm",
              max_num_seqs=options.max_sequences, enforce_eager=options.enforce_eager, **placed)  # fmt: skip
    chat, judge = Chat(options), Lengthy(**options.judge_options)
    params = SamplingParams(temperature=0.0, max_tokens=arguments.tokens, ignore_eos=True)
    tokens, seconds = [], []
    for batch in rounds(arguments):
        prompts = [{"prompt_token_ids": chat.encode(judge.sampling.prompt(judge.messages(q)))} for q in batch]
        start = time.perf_counter()
        outputs = llm.generate(prompts, params, use_tqdm=False)
        seconds.append(time.perf_counter() - start)
        tokens.append(sum(len(output.outputs[0].token_ids) for output in outputs))
    report(arguments, tokens[1:], seconds[1:])


def service_side(arguments: argparse.Namespace) -> None:
    import ray

    options = options_of(arguments)
    start_ray(len(os.sched_getaffinity(0)), int(arguments.device == "gpu"))
    try:
        tokens, seconds = asyncio.run(_ask(arguments, options))
    finally:
        ray.shutdown()
    report(arguments, tokens[1:], seconds[1:])


async def _ask(arguments: argparse.Namespace, options: GenRMOptions) -> tuple[list[int], list[float]]:
    service = start_service(options, [start_replica(LongEngine, options, arguments.device)])
    await service.ready.remote()
    clients = [GenRMClient(service, options, f"client {number}") for number in range(CLIENTS)]
    tokens, seconds = [], []
    for batch in rounds(arguments):
        start = time.perf_counter()
        found = await asyncio.gather(*(clients[n % CLIENTS].judge([q]) for n, q in enumerate(batch)))
        seconds.append(time.perf_counter() - start)
        verdicts = [verdict for (verdict,) in found]
        failed = [verdict for verdict in verdicts if verdict.value is None]
        if failed:
            raise RuntimeError(f"{len(failed)} of {len(verdicts)} questions got no verdict, the first: {failed[0]}")
        tokens.append(sum(verdict.detail["tokens"] for verdict in verdicts))
    return tokens, seconds


SIDES = {"vllm": vllm_side, "service": service_side}
