"""ToolExecutor: runs tool calls on behalf of the rollout workers.

  call -> queue (bounded, timed) -> one of `slots` places of its tool -> the tool, within the call's deadline -> result

Every tool has places of its own, so that a slow one does not hold up the others. Nothing blocks the event loop: tools
await, or work in threads (rollout/tools/threads.py).
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import Counter
from dataclasses import replace
from typing import Any

from rltk import watch
from rltk.errors import InfrastructureError
from rltk.rollout.tools.options import ToolOptions
from rltk.rollout.tools.python import PythonTool
from rltk.rollout.tools.registry import build
from rltk.rollout.tools.types import Tool, ToolRequest, ToolResult

log = logging.getLogger("rltk.tools")

GRACE_S = 1.0  # past a call's deadline: tools that know it (python) end by themselves and can say what fired


class ToolExecutor:
    """`ray.remote` is applied where it is placed (rltk/roles.py), with `max_restarts=-1` and
    `max_concurrency=concurrency(options)`; it can be used without Ray. Belongs to one event loop.

    It keeps nothing that a restart would lose for good: environments are rebuilt from their actions.
    """

    def __init__(self, options: ToolOptions) -> None:
        self._options = options
        self._tools: dict[str, Tool] = {}
        self._places: dict[str, asyncio.Semaphore] = {}
        self._building = asyncio.Lock()
        self._waiting = self._running = 0
        self._isolation = ""
        self._counts: Counter[str] = Counter()
        self._seconds = {"queue_s": 0.0, "run_s": 0.0, "cpu_s": 0.0}

    async def ready(self) -> dict[str, Any]:
        """Returns {"isolation": level reached ("": no tool runs code), "tools": names}. Raises ConfigError or
        InfrastructureError saying what stands in the way."""
        await self._build()
        return {"isolation": self._isolation, "tools": list(self._tools)}

    async def call(self, request: ToolRequest) -> ToolResult:
        """The result, at most GRACE_S after the request's wait and deadline; raises only what `ready` does."""
        await self._build()  # a restarted actor is asked for calls at once
        result = await self._call(request)
        self._counts[result.status] += 1
        for kind in self._seconds:
            self._seconds[kind] += getattr(result, kind)
        return result

    async def stats(self) -> dict[str, float]:
        """Calls by status and seconds by kind since the start; `waiting` and `running`, now."""
        return {"waiting": self._waiting, "running": self._running, **self._counts, **self._seconds}

    async def stacks(self) -> str:
        return f"tool executor: {await self.stats()}\n{watch.stacks()}"

    async def _build(self) -> None:
        async with self._building:
            if self._tools:
                return
            tools = await asyncio.to_thread(build, self._options)  # imports the user's modules, probes the jail
            for tool in tools.values():
                if isinstance(tool, PythonTool):
                    self._isolation = await tool.ready()
            self._places = {name: asyncio.Semaphore(self._options.slots) for name in tools}
            self._tools = tools

    async def _call(self, request: ToolRequest) -> ToolResult:
        tool = self._tools.get(request.name)
        if tool is None:
            known = ", ".join(self._tools)
            return ToolResult("unknown_tool", f"there is no tool {request.name!r}; there are {known}")
        places = self._places[request.name]
        if places.locked() and self._waiting >= self._options.queue:
            return ToolResult("infra_error", f"queue full: {self._waiting} calls wait here (tools.queue)")
        begin = time.monotonic()
        self._waiting += 1
        try:
            async with asyncio.timeout(request.wait_s):
                await places.acquire()
        except TimeoutError:
            words = f"no place free within {request.wait_s:g} s, all that the trajectory had left of tools.deadline_s; "
            words += "raise tools.slots or tools.executors"
            return ToolResult("infra_error", words, queue_s=time.monotonic() - begin)
        finally:
            self._waiting -= 1
        queue_s = time.monotonic() - begin
        self._running += 1
        try:
            result = await self._run(tool, request)
        finally:
            self._running -= 1
            places.release()
        run_s = result.run_s or time.monotonic() - begin - queue_s
        return replace(result, queue_s=queue_s, run_s=run_s)

    async def _run(self, tool: Tool, request: ToolRequest) -> ToolResult:
        work = asyncio.ensure_future(tool.run(request))
        try:
            await asyncio.wait({work}, timeout=request.deadline_s + GRACE_S)
            if not work.done():
                limit = f"call {request.deadline_s:g} s"
                return ToolResult("timeout", f"the call took longer than {request.deadline_s:.1f} s", limit)
            return work.result()
        except InfrastructureError as error:
            return ToolResult("infra_error", str(error))
        except Exception as error:
            log.exception("tool %s failed on turn %d of %s", request.name, request.turn, request.trajectory)
            return ToolResult("infra_error", f"tool {request.name} raised {type(error).__name__}: {error}")
        finally:
            work.cancel()  # past its deadline, or the caller has gone; a thread goes on, and Threads counts it


def concurrency(options: ToolOptions) -> int:
    """Calls that Ray must let into one executor: those that run and wait (a full queue is to be answered, not to wait
    in Ray, where nobody measures it), and the questions after its state."""
    return options.queue + options.slots * max(len(options.use), 1) + 64
