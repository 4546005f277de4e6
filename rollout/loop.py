"""Drives trajectories over engines and tools: each goes on as soon as it can, whatever the others wait for.

    Turns --Sample, Ask--> requests of one tick --> engine's stream --> completions --> Turns
          --Call---------> tools, each trajectory in a task of its own --> results ---> Turns
          --Done---------> ended (or failed, or paused), those of one tick together

First requests are added in the order of the jobs, before the engine's next step; a trajectory stays on its engine,
where its beginning is cached.
"""

from __future__ import annotations

import asyncio
import time
import uuid
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import replace
from typing import Any, Generic, TypeVar

from rltk import watch
from rltk.errors import InfrastructureError, MismatchError
from rltk.rollout.engine import Completion, Request
from rltk.rollout.steps import Ask, Call, Done, State
from rltk.rollout.tools.types import ToolRequest, ToolResult
from rltk.rollout.turns import Turns

T = TypeVar("T")
CallTool = Callable[[ToolRequest], Awaitable[ToolResult]]


class TurnLoop:
    """`ended` hears of trajectories that are complete. After `run`: `failed`, why samples could not be used, and
    `paused`, what is left of those that `pause` stopped; both by uid."""

    def __init__(self, call: CallTool | None, ended: Callable[[list[Turns]], None], deadline_s: float) -> None:
        self._call, self._deadline_s = call, deadline_s
        self._ended = Tick(ended)
        self._pausing = False
        self._start = time.monotonic()
        self._lanes: dict[str, Lane] = {}  # by trajectory
        self.failed: dict[str, str] = {}
        self.paused: dict[str, State] = {}

    def pause(self) -> None:
        """What is being sampled or run is brought to its end; no trajectory begins another turn."""
        self._pausing = True

    async def run(self, shares: Sequence[tuple[Any, list[Turns]]]) -> None:
        """(engine handle, its trajectories): returns once each has ended, failed or been paused. Raises what an engine
        raised; then none goes on."""
        lanes = [Lane(engine, turns) for engine, turns in shares if turns]
        self._lanes = {turns.job.uid: lane for lane in lanes for turns in lane.turns}
        try:
            async with asyncio.TaskGroup() as tasks:
                for lane in lanes:
                    lane.tasks = tasks
                    for turns in lane.turns:
                        self._advance(turns)
                    tasks.create_task(self._consume(lane))
        except BaseExceptionGroup as group:
            raise group.exceptions[0] from None
        self._ended.hand_over()

    async def _consume(self, lane: Lane) -> None:
        await watch.wait(
            self._stream(lane), f"roll out {len(lane.turns)} samples by turns", "rollout worker", "engine",
            self._deadline_s, peek=lambda: lane.engine.stacks.remote(),
        )  # fmt: skip

    async def _stream(self, lane: Lane) -> None:
        try:
            async for completions in lane.completions():
                for completion in completions:
                    turns = lane.waiting.pop(completion.uid)
                    self._feed(turns, completion)
        finally:
            lane.close()

    def _feed(self, turns: Turns, came: Completion | list[ToolResult]) -> None:
        try:
            if isinstance(came, list):
                turns.results(came)
            elif isinstance(turns.next(), Ask):
                turns.asked(came)
            else:
                turns.sampled(came)
        except (MismatchError, InfrastructureError) as error:
            # A broken sample is never repaired: it ends here, with its reason.
            self.failed[turns.job.uid] = str(error)
            self._over(turns)
            return
        self._advance(turns)

    def _advance(self, turns: Turns) -> None:
        lane, spent_s = self._lanes[turns.job.uid], time.monotonic() - self._start
        step = turns.next(spent_s)
        if isinstance(step, Done):
            self._ended.put(turns)
            self._over(turns)
        elif isinstance(step, Call):
            left_s = turns.left_s(spent_s)
            lane.tasks.create_task(self._run_tools(turns, [replace(r, wait_s=left_s) for r in step.requests]))
        elif self._pausing and not isinstance(step, Ask):
            self.paused[turns.job.uid] = turns.pause(spent_s)
            self._over(turns)
        else:
            lane.send(turns, step.request)

    async def _run_tools(self, turns: Turns, requests: Sequence[ToolRequest]) -> None:
        assert self._call is not None
        self._feed(turns, list(await asyncio.gather(*(self._call(request) for request in requests))))

    def _over(self, turns: Turns) -> None:
        self._lanes[turns.job.uid].over(turns)


class Lane:
    """One engine's share, over one stream that stays open while trajectories live on it."""

    def __init__(self, engine: Any, turns: list[Turns]) -> None:
        self.engine, self.turns = engine, turns
        self.tasks: asyncio.TaskGroup
        self.waiting: dict[str, Turns] = {}  # by request
        self._alive = {each.job.uid for each in turns}
        self._channel = uuid.uuid4().hex
        self._opened = False
        self._first: list[Request] | None = []  # None once the stream has begun
        self._later = Tick(lambda requests: self.tasks.create_task(self._extend(requests)))

    def send(self, turns: Turns, request: Request) -> None:
        self.waiting[request.uid] = turns
        if self._first is None:
            self._later.put(request)
        else:
            self._first.append(request)

    def over(self, turns: Turns) -> None:
        self._alive.discard(turns.job.uid)
        if not self._alive and self._opened:
            self.close()

    async def completions(self) -> Any:
        if not self._alive:  # nothing was left to sample
            return
        first, self._first, self._opened = self._first, None, True
        stream = self.engine.generate.options(num_returns="streaming").remote(first, self._channel)
        async for reference in stream:
            yield await reference

    def close(self) -> None:
        """End the stream; what still runs on it is aborted. Nobody waits for it: the engine may be what failed."""
        if self._opened:
            self.engine.close.remote(self._channel)
            self._opened = False

    async def _extend(self, requests: list[Request]) -> None:
        await self.engine.extend.remote(self._channel, requests)


class Tick(Generic[T]):
    """Items of one tick of the event loop, handed over together."""

    def __init__(self, deliver: Callable[[list[T]], Any]) -> None:
        self._deliver, self._items = deliver, []

    def put(self, item: T) -> None:
        if not self._items:
            asyncio.get_running_loop().call_soon(self.hand_over)
        self._items.append(item)

    def hand_over(self) -> None:
        items, self._items = self._items, []
        if items:
            self._deliver(items)
