"""RolloutWorker: turns issues into scored trajectories. An asyncio actor; any number may run.

It owns the tokenizer and the turns, speaks to one or more engines, and hands each trajectory to the reward workers as
it ends, so that scoring overlaps generation.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from rltk import watch
from rltk.errors import ConfigError, MismatchError
from rltk.rollout.engine import Completion, Request
from rltk.rollout.tokens import check_template, load_tokenizer, render_prompt, stop_ids
from rltk.trajectory import Record, RewardRecord, Segment, Trajectory


@dataclass(frozen=True)
class Job:
    """One sample to roll out: the ledger's uid and group, the record, and the sampling seed."""

    uid: str
    group: str
    record: Record
    seed: int


@dataclass(frozen=True)
class Sampling:
    temperature: float
    max_prompt_tokens: int
    max_response_tokens: int


@dataclass(frozen=True)
class RolloutResult:
    """Trajectories in the order of the jobs, scored; `failed` names samples that could not be used, with the reason."""

    trajectories: list[Trajectory]
    failed: dict[str, str]
    generate_seconds: float  # until the last token
    reward_seconds: float  # from there until the last score


class RolloutWorker:
    """`engines` and `rewards` are actor handles; `deadlines` seconds: {"rollout": ..., "reward": ...}."""

    def __init__(
        self,
        model: str,
        engines: Sequence[Any],
        rewards: Sequence[Any],
        deadlines: dict[str, float],
        chat_template: str | None = None,
    ) -> None:
        self.tokenizer = load_tokenizer(model, chat_template)
        check_template(self.tokenizer)
        self.stop_ids = tuple(stop_ids(self.tokenizer, model))
        self.engines, self.rewards, self.deadlines = list(engines), list(rewards), deadlines
        self._done = self._total = self._scored = 0
        self._prompts: dict[str, list[int]] = {}

    def set_engines(self, engines: Sequence[Any]) -> None:
        """After a dead engine was replaced."""
        self.engines = list(engines)

    def ready(self) -> bool:
        return True

    def stacks(self) -> str:
        return watch.stacks()

    def progress(self) -> tuple[int, int]:
        """Samples done and asked for in the current call (progress views)."""
        return self._done, self._total

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        """Plain tokenization, for fixed sequences such as the probe's."""
        return [self.tokenizer.encode(text, add_special_tokens=False) for text in texts]

    async def rollout(self, jobs: Sequence[Job], sampling: Sampling) -> RolloutResult:
        """Sample and score every job. Jobs of one prompt share its ids; nothing sampled is ever re-encoded."""
        start = time.perf_counter()
        self._done, self._total, self._prompts = 0, len(jobs), {}
        requests = [self._request(job, sampling) for job in jobs]
        by_uid = {job.uid: job for job in jobs}
        # Contiguous shares: a group stays on one engine, where its prompt is cached.
        shares = _split(requests, len(self.engines))
        streams = [
            self._stream(engine, share, by_uid) for engine, share in zip(self.engines, shares, strict=True) if share
        ]
        running = [asyncio.create_task(stream) for stream in streams]
        try:
            scored = [task for tasks in await asyncio.gather(*running) for task in tasks]
        except BaseException:  # one engine failed: what the others still do is of no use
            for task in running:
                task.cancel()
            raise
        generated = time.perf_counter()
        trajectories: dict[str, Trajectory] = {}
        failed: dict[str, str] = {}
        for batch, batch_failed in await asyncio.gather(*scored):
            trajectories.update({t.uid: t for t in batch})
            failed.update(batch_failed)
        ordered = [trajectories[job.uid] for job in jobs if job.uid in trajectories]
        return RolloutResult(ordered, failed, generated - start, time.perf_counter() - generated)

    def _request(self, job: Job, sampling: Sampling) -> Request:
        ids = self._prompts.get(job.record.id)
        if ids is None:
            ids = self._prompts[job.record.id] = render_prompt(self.tokenizer, job.record.messages)
        if len(ids) > sampling.max_prompt_tokens:
            raise ConfigError(
                f"prompt {job.record.id} has {len(ids)} tokens, over "
                f"task.max_prompt_tokens={sampling.max_prompt_tokens}. "
                "Fix: raise task.max_prompt_tokens, or drop long problems from the task."
            )
        return Request(job.uid, ids, sampling.max_response_tokens, sampling.temperature, job.seed, self.stop_ids)

    async def _stream(self, engine: Any, requests: list[Request], jobs: dict[str, Job]) -> list[asyncio.Task]:
        """Consume one engine's stream; start scoring each batch as it arrives. Returns the scoring tasks."""

        async def consume() -> list[asyncio.Task]:
            tasks = []
            stream = engine.generate.options(num_returns="streaming").remote(requests)
            async for reference in stream:
                completions = await reference
                self._done += len(completions)
                tasks.append(asyncio.create_task(self._score([(jobs[c.uid], c) for c in completions])))
            return tasks

        return await watch.wait(
            consume(), f"generate {len(requests)} samples", "rollout worker", "engine",
            self.deadlines["rollout"], peek=lambda: engine.stacks.remote(),
        )  # fmt: skip

    async def _score(self, items: list[tuple[Job, Completion]]) -> tuple[list[Trajectory], dict[str, str]]:
        trajectories, failed = [], {}
        for job, completion in items:
            try:
                trajectories.append(self._trajectory(job, completion))
            except MismatchError as error:  # a broken sample is never repaired: it ends here, with its reason
                failed[job.uid] = str(error)
        jobs = {job.uid: job for job, _ in items}
        pairs = [(t, jobs[t.uid].record) for t in trajectories]
        records = await self._rewards(pairs) if pairs else []
        return [replace(t, reward=r) for t, r in zip(trajectories, records, strict=True)], failed

    def _trajectory(self, job: Job, completion: Completion) -> Trajectory:
        if completion.finish_reason not in ("stop", "length"):
            raise MismatchError(f"request {job.uid} ended with {completion.finish_reason!r}, not by the model")
        prompt = Segment("prompt", np.asarray(self._prompts[job.record.id]))
        model = Segment(
            "model", completion.ids, completion.logprobs, completion.weight_version, completion.finish_reason
        )
        text = self.tokenizer.decode(completion.ids.tolist(), skip_special_tokens=True)
        return Trajectory(job.uid, job.record.id, job.group, (prompt, model), text)

    async def _rewards(self, pairs: list[tuple[Trajectory, Record]]) -> list[RewardRecord]:
        """Scores, in order. A reward worker that fails or is late masks these samples; it never stops the step."""
        self._scored += 1
        worker = self.rewards[self._scored % len(self.rewards)]
        try:
            return await watch.wait(
                worker.score.remote(pairs, 0.8 * self.deadlines["reward"]),  # it masks what is late, before we do
                f"score {len(pairs)} samples", "rollout worker", "reward worker",
                self.deadlines["reward"], peek=lambda: worker.stacks.remote(),
            )  # fmt: skip
        except Exception as error:
            reason = f"reward worker failed: {type(error).__name__}"
            return [RewardRecord(None, reason, detail={"error": str(error)[:500]}) for _ in pairs]


def _split(items: list[Request], parts: int) -> list[list[Request]]:
    size, extra = divmod(len(items), parts)
    bounds = [i * size + min(i, extra) for i in range(parts + 1)]
    return [items[a:b] for a, b in zip(bounds, bounds[1:], strict=False)]
