"""Blocking work beside an event loop: a fixed number of long-lived threads, and an honest count of those that hang."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

from rltk.errors import InfrastructureError

T = TypeVar("T")


class Threads:
    """At most `count` calls at once, each in a thread of its own that lives on: a jail's child dies with the thread
    that spawned it.

    A thread cannot be ended. A call that its caller gave up on keeps its thread; once none is left, every further call
    is an InfrastructureError, so that it goes to another executor instead of waiting here for ever.
    """

    def __init__(self, name: str, count: int) -> None:
        self._name, self._count, self._busy = name, count, 0
        self._pool = ThreadPoolExecutor(count, thread_name_prefix=f"tool {name}")

    async def run(self, call: Callable[..., T], *arguments: Any) -> T:
        if self._busy >= self._count:
            raise InfrastructureError(
                f"tool {self._name}: each of its {self._count} threads (tools.slots) is in a call that did not end by "
                "its deadline; make it an async function, or let it give up in time"
            )
        loop = asyncio.get_running_loop()
        self._busy += 1
        future = self._pool.submit(call, *arguments)

        def ended(_: Any) -> None:
            with contextlib.suppress(RuntimeError):  # the loop has ended before its thread
                loop.call_soon_threadsafe(self._free)

        future.add_done_callback(ended)  # before wrap_future's own: the thread is free when the caller hears of it
        return await asyncio.wrap_future(future)

    def _free(self) -> None:
        self._busy -= 1
