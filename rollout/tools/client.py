"""ToolClient: a rollout worker's way to the executors. It chooses, waits with a deadline, and tries again elsewhere."""

from __future__ import annotations

import asyncio
import logging
import time
import zlib
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from rltk import watch
from rltk.rollout.tools import registry
from rltk.rollout.tools.options import ToolOptions
from rltk.rollout.tools.types import ToolRequest, ToolResult

log = logging.getLogger("rltk.tools")

RETRIES = 2
PAUSE_S = 0.5  # before a retry, doubled: an actor that died needs seconds to come back
SHUNNED_S = 5.0  # an executor that failed gets no call this long while others stand: its load is low for a bad reason
MARGIN_S = 5.0  # past a call's deadline, for the way there and back
ANSWER_S = 30.0  # for an executor to say that it lives, while a call waits longer than it would run


class ToolClient:
    """`executors`: handles whose `.call.remote(request)` can be awaited. Belongs to one event loop."""

    def __init__(self, executors: Sequence[Any], options: ToolOptions) -> None:
        self._executors = list(executors)
        self._load = [0] * len(self._executors)
        self._shunned = [0.0] * len(self._executors)  # until then, time.monotonic
        self._asked: dict[int, asyncio.Future[None]] = {}  # by executor: whether it lives
        self._homes = registry.environment(options)

    async def call(self, request: ToolRequest) -> ToolResult:
        """The result of the first executor that has one. An infra_error comes back after RETRIES, with what each try
        said. `wait_s` is that of all tries together, the deadline that of each."""
        begin = time.monotonic()
        tried: list[int] = []
        words: list[str] = []
        result = ToolResult("infra_error", "there is no executor")
        for attempt in range(RETRIES + 1):
            if attempt:
                await asyncio.sleep(PAUSE_S * 2 ** (attempt - 1))
            chosen = self._choose(request.trajectory, tried)
            left_s = max(0.0, request.wait_s - (time.monotonic() - begin))
            result = await self._try(chosen, replace(request, wait_s=left_s))
            if result.status != "infra_error":
                return result
            tried.append(chosen)
            words.append(f"executor {chosen}: {result.text}")
            self._shunned[chosen] = time.monotonic() + SHUNNED_S
            log.warning("tool %s, turn %d of %s: %s", request.name, request.turn, request.trajectory, words[-1])
        return replace(result, text=f"{RETRIES + 1} tries failed: {'; '.join(words)}")

    def _choose(self, trajectory: str, tried: Sequence[int]) -> int:
        """One not tried yet, not shunned, the least loaded; an environment's trajectory stays where its state is."""
        now = time.monotonic()
        home = zlib.crc32(trajectory.encode()) % len(self._executors) if self._homes else -1

        def cost(number: int) -> tuple[int, bool, bool, int]:
            return tried.count(number), self._shunned[number] > now, self._homes and number != home, self._load[number]

        return min(range(len(self._executors)), key=cost)

    async def _try(self, number: int, request: ToolRequest) -> ToolResult:
        executor = self._executors[number]
        self._load[number] += 1
        try:
            return await watch.wait(
                self._result(number, request), f"run tool {request.name}", "rollout worker", f"tool executor {number}",
                request.wait_s + request.deadline_s + MARGIN_S, peek=lambda: executor.stacks.remote(),
            )  # fmt: skip
        except Exception as error:  # it died, is late, or cannot build its tools
            return ToolResult("infra_error", f"{type(error).__name__}: {str(error)[:500]}")
        finally:
            self._load[number] -= 1

    async def _result(self, number: int, request: ToolRequest) -> ToolResult:
        """A call waits for its place as long as its executor lives; one that no longer answers is left for another."""

        async def call() -> ToolResult:
            return await self._executors[number].call.remote(request)

        work = asyncio.ensure_future(call())
        try:
            while not (await asyncio.wait({work}, timeout=request.deadline_s + MARGIN_S))[0]:
                await self._lives(number)
            return work.result()
        finally:
            work.cancel()

    async def _lives(self, number: int) -> None:
        """Raises TimeoutError for an executor that does not answer. One question at a time, however many calls wait."""

        async def ask() -> None:
            async with asyncio.timeout(ANSWER_S):
                await self._executors[number].stats.remote()

        if number not in self._asked:
            self._asked[number] = asyncio.ensure_future(ask())
            self._asked[number].add_done_callback(lambda _: self._asked.pop(number, None))
        await asyncio.shield(self._asked[number])
