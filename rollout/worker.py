"""RolloutWorker: turns issues into scored trajectories. An asyncio actor; any number may run.

It owns the tokenizer and the turns, speaks to one or more engines, and hands each trajectory to the reward workers as
it ends, so that scoring overlaps generation.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

import numpy as np
import ray

from rltk import watch
from rltk.errors import ConfigError, MismatchError
from rltk.rollout.dtsr import QUESTION_TOKENS
from rltk.rollout.engine import Completion, Request
from rltk.rollout.formats import build_format, told
from rltk.rollout.interventions import Intervention, build_interventions
from rltk.rollout.job import Job, Sampling
from rltk.rollout.loop import TurnLoop
from rltk.rollout.new_text import NewText
from rltk.rollout.steps import State, TurnSettings
from rltk.rollout.texts import model_segment
from rltk.rollout.tokens import check_template, load_tokenizer, render_prompt, stop_ids
from rltk.rollout.tools import registry
from rltk.rollout.tools.client import ToolClient
from rltk.rollout.tools.options import AttcOptions, DtsrOptions, ToolOptions, appends
from rltk.rollout.turns import Turns
from rltk.trajectory import Record, RewardRecord, Segment, Trajectory

__all__ = ["Job", "RolloutResult", "RolloutWorker", "Sampling"]
T = TypeVar("T")


@dataclass(frozen=True)
class RolloutResult:
    """Trajectories in the order of the jobs, scored; `failed` names samples that could not be used, with the reason.

    partial: what `pause` left of the others, by uid; as Job.partial they go on, under whatever weights there are then.
    """

    trajectories: list[Trajectory]
    failed: dict[str, str]
    generate_seconds: float  # until the last token
    reward_seconds: float  # from there until the last score
    partial: dict[str, State] = field(default_factory=dict)


class RolloutWorker:
    """`engines`, `rewards` and `executors` are actor handles; `deadlines` seconds: {"rollout": ..., "reward": ...}, and
    "judge", what the reward workers may take besides, where a judge speaks after the rule.

    Raises ConfigError where the chat template or the tokenizer cannot do what `tools.format` asks of them.
    """

    def __init__(
        self,
        model: str,
        engines: Sequence[Any],
        rewards: Sequence[Any],
        deadlines: dict[str, float],
        chat_template: str | None = None,
        tools: ToolOptions | None = None,
        executors: Sequence[Any] = (),
        attc: AttcOptions | None = None,
        dtsr: DtsrOptions | None = None,
    ) -> None:
        self.tokenizer = load_tokenizer(model, chat_template)
        self.stop_ids = tuple(stop_ids(self.tokenizer, model))
        self.engines, self.rewards, self.deadlines = list(engines), list(rewards), deadlines
        self.tools, self.attc, self.dtsr = tools or ToolOptions(), attc or AttcOptions(), dtsr or DtsrOptions()
        if appends(self.tools, self.attc, self.dtsr):
            check_template(self.tokenizer)
        self.signatures = registry.signatures(self.tools)
        self.environment = registry.environment(self.tools)
        self.format = build_format(self.tools, self.tokenizer, self.signatures, self.stop_ids, self.environment)
        self.new_text = NewText(self.tokenizer)
        self.client = ToolClient(executors, self.tools) if self.tools.enabled else None
        self._loop: TurnLoop | None = None
        self._done = self._total = self._scored = 0
        self._scoring: list[asyncio.Task] = []  # of the rollout under way
        self._evaluation = False  # what is rolled out now, for whoever scores it
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

    def pause(self) -> None:
        """End the current rollout by turns soon: nothing begins another turn, and what is left of samples comes back as
        `RolloutResult.partial`. Calls that run are waited for. Samples of one turn alone are not cut short."""
        if self._loop is not None:
            self._loop.pause()

    async def rollout(self, jobs: Sequence[Job], sampling: Sampling) -> RolloutResult:
        """Sample and score every job. Jobs of one prompt share its ids; nothing sampled is ever re-encoded."""
        start = time.perf_counter()
        self._done, self._total, self._prompts = 0, len(jobs), {}
        self._evaluation = sampling.evaluation
        self._scoring = []
        partial: dict[str, State] = {}
        failed: dict[str, str] = {}
        try:
            if self._by_turns(sampling):
                failed, partial = await self._turns(jobs, sampling)
            else:
                await self._single(jobs, sampling)
            generated = time.perf_counter()
            scored = await asyncio.gather(*self._scoring)
        except BaseException:  # nobody wants these samples any more: a judge is not to read them
            for task in self._scoring:
                task.cancel()
            raise
        trajectories: dict[str, Trajectory] = {}
        for batch, batch_failed in scored:
            trajectories.update({t.uid: t for t in batch})
            failed.update(batch_failed)
        ordered = [trajectories[job.uid] for job in jobs if job.uid in trajectories]
        return RolloutResult(ordered, failed, generated - start, time.perf_counter() - generated, partial)

    # -- one turn: no tools, and nothing steps in ----------------------------------------------------------------------

    async def _single(self, jobs: Sequence[Job], sampling: Sampling) -> None:
        """One request a job. Returns once every sample is there; scoring may go on."""
        requests = [self._request(job, sampling) for job in jobs]
        by_uid = {job.uid: job for job in jobs}
        # Contiguous shares: a group stays on one engine, where its prompt is cached.
        shares = _split(requests, len(self.engines))
        streams = [
            self._stream(engine, share, by_uid) for engine, share in zip(self.engines, shares, strict=True) if share
        ]
        running = [asyncio.create_task(stream) for stream in streams]
        try:
            await asyncio.gather(*running)
        except BaseException:  # one engine failed: what the others still do is of no use
            for task in running:
                task.cancel()
            raise

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

    async def _stream(self, engine: Any, requests: list[Request], jobs: dict[str, Job]) -> None:
        """Consume one engine's stream; start scoring each batch as it arrives."""

        async def consume() -> None:
            stream = engine.generate.options(num_returns="streaming").remote(requests)
            async for reference in stream:
                completions = await reference
                self._done += len(completions)
                items = [(jobs[c.uid], lambda c=c: self._trajectory(jobs[c.uid], c)) for c in completions]
                self._scoring.append(asyncio.create_task(self._score(items)))

        await watch.wait(
            consume(), f"generate {len(requests)} samples", "rollout worker", "engine",
            self.deadlines["rollout"], peek=lambda: engine.stacks.remote(),
        )  # fmt: skip

    def _trajectory(self, job: Job, completion: Completion) -> Trajectory:
        prompt = Segment("prompt", np.asarray(self._prompts[job.record.id]))
        text = self.tokenizer.decode(completion.ids.tolist(), skip_special_tokens=True)
        return Trajectory(job.uid, job.record.id, job.group, (prompt, model_segment(completion)), text)

    # -- turns -------------------------------------------------------------------------------------------------------

    def _by_turns(self, sampling: Sampling) -> bool:
        return self.tools.enabled or bool(self._interventions(sampling))

    def _interventions(self, sampling: Sampling) -> list[Intervention]:
        return build_interventions(self.attc, self.dtsr, sampling.evaluation, self.tools.answer_marks)

    async def _turns(self, jobs: Sequence[Job], sampling: Sampling) -> tuple[dict[str, str], dict[str, State]]:
        """Returns why samples failed, and what is left of those that were paused; scoring may go on."""
        settings = self._settings(sampling)

        def ended(batch: list[Turns]) -> None:
            self._done += len(batch)
            self._scoring.append(asyncio.create_task(self._score([(turns.job, turns.trajectory) for turns in batch])))

        every = [
            Turns(job, settings, self._interventions(sampling))
            if job.partial is None
            else Turns.resume(job, settings, job.partial)
            for job in jobs
        ]
        call = self.client.call if self.client else None
        self._loop = TurnLoop(call, ended, self.deadlines["rollout"])
        try:
            await self._loop.run(list(zip(self.engines, _split(every, len(self.engines)), strict=True)))
        finally:
            loop, self._loop = self._loop, None
        return loop.failed, loop.paused

    def _settings(self, sampling: Sampling) -> TurnSettings:
        tools = replace(self.tools, void_turns="keep") if sampling.evaluation else self.tools
        new = tools.total_tokens if tools.enabled else 0
        asked = QUESTION_TOKENS + self.dtsr.reply_tokens if self.dtsr.mode != "off" else 0
        return TurnSettings(
            tokenizer=self.tokenizer,
            new_text=self.new_text,
            format=self.format,
            options=tools,
            names=tuple(signature.name for signature in self.signatures),
            schemas=told(tools, self.signatures, self.environment),
            environment=self.environment,
            stop_ids=self.stop_ids,
            temperature=sampling.temperature,
            max_prompt_tokens=sampling.max_prompt_tokens,
            max_response_tokens=sampling.max_response_tokens,
            # What the engines were started with room for (rltk/kv_size.py).
            context=sampling.max_prompt_tokens + sampling.max_response_tokens + new + asked,
        )

    # -- scores ------------------------------------------------------------------------------------------------------

    async def _score(
        self, items: list[tuple[Job, Callable[[], Trajectory]]]
    ) -> tuple[list[Trajectory], dict[str, str]]:
        trajectories, failed = [], {}
        for job, make in items:
            try:
                trajectories.append(make())
            except MismatchError as error:  # a broken sample is never repaired: it ends here, with its reason
                failed[job.uid] = str(error)
        jobs = {job.uid: job for job, _ in items}
        asked = [t for t in trajectories if t.reward is None]
        records = await self._rewards([(t, jobs[t.uid].record) for t in asked]) if asked else []
        found = {t.uid: record for t, record in zip(asked, records, strict=True)}
        return [replace(t, reward=found.get(t.uid, t.reward)) for t in trajectories], failed

    async def _rewards(self, pairs: list[tuple[Trajectory, Record]]) -> list[RewardRecord]:
        """Scores, in order. A reward worker that fails or is late masks these samples; it never stops the step."""
        self._scored += 1
        worker = self.rewards[self._scored % len(self.rewards)]
        # It masks what is late, before we do.
        reference = worker.score.remote(pairs, 0.8 * self.deadlines["reward"], self._evaluation)
        try:
            return await watch.wait(
                reference, f"score {len(pairs)} samples", "rollout worker", "reward worker",
                self.deadlines["reward"] + self.deadlines.get("judge", 0.0), peek=lambda: worker.stacks.remote(),
            )  # fmt: skip
        except asyncio.CancelledError:
            ray.cancel(reference)
            raise
        except Exception as error:
            reason = f"reward worker failed: {type(error).__name__}"
            return [RewardRecord(None, reason, detail={"error": str(error)[:500]}) for _ in pairs]


def _split(items: list[T], parts: int) -> list[list[T]]:
    size, extra = divmod(len(items), parts)
    bounds = [i * size + min(i, extra) for i in range(parts + 1)]
    return [items[a:b] for a, b in zip(bounds, bounds[1:], strict=False)]
