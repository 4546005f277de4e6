"""The throughput arm of bench.genrm_service: the same prompts through the service and through plain vLLM.

Both are given as many sequences, as much context and memory, and write replies of one length; each in a process of its
own, after a round of other prompts that is not timed. Then they take turns, a round each, while the other stands still,
so that what else the machine does meets both. Plain vLLM is `LLM.generate` as it comes, in this process (the faster of
its two ways), all prompts in one call. The service is asked by eight clients, a question a call.
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
from rltk.rewards.genrm.types import Question, Verdict

CLIENTS = 8
DEADLINE_S = 600.0  # of a side's start, and of a round
SIDES: dict[str, Callable[[argparse.Namespace], None]]


def run(arguments: argparse.Namespace, words: list[str], say: Callable[[str], None]) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        sides: list[Side] = []
        try:
            for name in SIDES:  # one after another: vLLM measures the memory that is free as it starts
                sides.append(Side(name, words, Path(folder) / f"{name}.json"))
                sides[-1].wait(0)
            for number in range(1, arguments.repeats + 1):
                for side in sides:
                    side.begin()
                    side.wait(number)
            found = {side.name: side.rounds[1:] for side in sides}
        finally:
            for side in sides:
                side.stop()
    rates = {name: [tokens / seconds for tokens, seconds in rows] for name, rows in found.items()}
    for name, values in rates.items():
        say(f"{name:8} {', '.join(f'{rate:.0f}' for rate in values)} tokens/s; {found[name][0][0]} tokens a round")
    if [tokens for tokens, _ in found["vllm"]] != [tokens for tokens, _ in found["service"]]:
        raise RuntimeError(f"the two sides did not write as much: {found}")
    ratios = [ours / theirs for ours, theirs in zip(rates["service"], rates["vllm"], strict=True)]
    return {
        "model": arguments.model, "device": arguments.device, "prompts": arguments.prompts,
        "tokens_each": arguments.tokens, "service_tokens_per_s": statistics.median(rates["service"]),
        "vllm_tokens_per_s": statistics.median(rates["vllm"]), "throughput_over_vllm": statistics.median(ratios),
        "ratios": ratios, "rounds": rates,
    }  # fmt: skip


class Side:
    """A side's process. It is told on its stdin to begin a round, and writes what its rounds so far took to a file."""

    def __init__(self, name: str, words: list[str], file: Path) -> None:
        self.name, self._file, self.rounds = name, file, []
        command = [sys.executable, "-m", "bench.genrm_service", *words, "--side", name, "--into", str(file)]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE)

    def begin(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.write(b"\n")
        self._process.stdin.flush()

    def wait(self, number: int) -> None:
        """Until round `number` is written; 0: the one that is not timed."""
        until = time.monotonic() + DEADLINE_S
        while len(self.rounds) <= number:
            if self._process.poll() is not None:
                raise RuntimeError(f"{self.name} ended with {self._process.returncode} before its round {number}")
            if time.monotonic() > until:
                raise RuntimeError(f"{self.name} did not finish its round {number} in {DEADLINE_S:.0f} s")
            time.sleep(0.1)
            if self._file.exists():
                self.rounds = json.loads(self._file.read_text())

    def stop(self) -> None:
        """Its end of input ends it."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        try:
            self._process.wait(60)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()


def rounds(arguments: argparse.Namespace) -> list[list[Question]]:
    """The first, which fills every place, is for warming up. No two ask the same, and no prefix cache helps one side
    alone."""
    sizes = [arguments.sequences, *[arguments.prompts] * arguments.repeats]
    made = questions(0, 2 * sum(sizes))
    kept = list({(q.problem, q.response): q for q in made}.values())[: sum(sizes)]
    starts = [sum(sizes[:number]) for number in range(len(sizes))]
    return [kept[start : start + size] for start, size in zip(starts, sizes, strict=True)]


def options_of(arguments: argparse.Namespace) -> GenRMOptions:
    gpu = arguments.device == "gpu"
    return GenRMOptions(
        name="bench", judge="bench.genrm_parts:Lengthy", model=model_folder(arguments.model),
        judge_options={"max_tokens": arguments.tokens}, dtype="bfloat16" if gpu else "float32",
        context=1024, max_sequences=arguments.sequences, kv_cache_gib=0.5, gpu_memory_share=0.4, enforce_eager=not gpu,
        threads=0 if gpu else 1, deadline_s=900.0, attempt_s=900.0,
        queue=max(arguments.prompts, arguments.sequences), cache=0,
    )  # fmt: skip


def take_turns(arguments: argparse.Namespace, answer: Callable[[list[Question]], int]) -> None:
    """A side's rounds, each once it is told to begin. answer: gives the tokens that were written."""
    done: list[tuple[int, float]] = []
    for batch in rounds(arguments):
        if done and not sys.stdin.readline():
            return
        start = time.perf_counter()
        tokens = answer(batch)
        done.append((tokens, time.perf_counter() - start))
        write_json(arguments.into, done)
    sys.stdin.readline()  # stands until the other side is done, too


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

    def answer(batch: list[Question]) -> int:
        prompts = [{"prompt_token_ids": chat.encode(judge.sampling.prompt(judge.messages(q)))} for q in batch]
        outputs = llm.generate(prompts, params, use_tqdm=False)
        return sum(len(output.outputs[0].token_ids) for output in outputs)

    take_turns(arguments, answer)


def service_side(arguments: argparse.Namespace) -> None:
    import ray

    options = options_of(arguments)
    start_ray(len(os.sched_getaffinity(0)), int(arguments.device == "gpu"))
    try:
        service = start_service(options, [start_replica(LongEngine, options, arguments.device)])
        ray.get(service.ready.remote(), timeout=DEADLINE_S)
        clients = [GenRMClient(service, options, f"client {number}") for number in range(CLIENTS)]

        async def ask(batch: list[Question]) -> list[Verdict]:
            found = await asyncio.gather(*(clients[n % CLIENTS].judge([q]) for n, q in enumerate(batch)))
            return [verdict for (verdict,) in found]

        with asyncio.Runner() as runner:

            def answer(batch: list[Question]) -> int:
                verdicts = runner.run(ask(batch))
                failed = [verdict for verdict in verdicts if verdict.value is None]
                if failed:
                    raise RuntimeError(f"{len(failed)} of {len(verdicts)} got no verdict, the first: {failed[0]}")
                return sum(verdict.detail["tokens"] for verdict in verdicts)

            take_turns(arguments, answer)
    finally:
        ray.shutdown()


SIDES = {"vllm": vllm_side, "service": service_side}
