"""Verdicts that are known, and those somebody is already asking for: nobody asks a judge the same thing twice.

Samples of one group that are alike word for word cost one verdict: the first asks, the others join it.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import math
import time
from collections import OrderedDict
from collections.abc import Awaitable, Callable
from dataclasses import dataclass

from rltk.rewards.genrm.types import Judge, Question, Verdict


def cache_key(model: str, judge: Judge, question: Question) -> bytes:
    """Of everything a verdict depends on: the model with its revision, the judge with its templates, options and
    sampling, and what it is asked. Not the uid and the group."""
    asked = (question.problem, question.reference, question.response, question.data)
    text = json.dumps([model, judge.name, judge.version, *asked], sort_keys=True, default=repr)
    return hashlib.sha256(text.encode()).digest()


@dataclass
class Flight:
    task: asyncio.Task[Verdict]
    deadline: float  # of who asked
    waiters: int = 0

    @property
    def late(self) -> bool:
        """Who asked had no time left: another may have more."""
        return time.monotonic() >= self.deadline


class VerdictCache:
    """At most `size` verdicts, the least recently used go first. Belongs to one event loop."""

    def __init__(self, size: int) -> None:
        self._size = size
        self._known: OrderedDict[bytes, Verdict] = OrderedDict()
        self._flights: dict[bytes, Flight] = {}

    def __len__(self) -> int:
        return len(self._known)

    async def get(
        self, key: bytes, ask: Callable[[], Awaitable[Verdict]], deadline: float = math.inf
    ) -> tuple[Verdict, str]:
        """The verdict, and how it was had: asked | joined (somebody else's question) | cached.

        Only verdicts with a value are kept. A question goes on while one who waits for it is left; with the last it is
        cancelled. One that was joined and found no verdict in the time of who asked it is asked anew, by whoever still
        has time (`deadline`, of time.monotonic).
        """
        while True:
            if key in self._known:
                self._known.move_to_end(key)
                return self._known[key], "cached"
            flight, how = self._flights.get(key), "joined"
            if flight is None or flight.task.done():  # done: those who waited for it have yet to wake
                flight, how = Flight(asyncio.ensure_future(self._fly(key, ask)), deadline), "asked"
                self._flights[key] = flight
            verdict = await self._wait(key, flight)
            if how == "asked" or verdict.value is not None or not flight.late or time.monotonic() >= deadline:
                return verdict, how

    async def _wait(self, key: bytes, flight: Flight) -> Verdict:
        flight.waiters += 1
        try:
            return await asyncio.shield(flight.task)
        finally:
            flight.waiters -= 1
            if not flight.waiters:
                flight.task.cancel()  # of no effect once it is done
                if self._flights.get(key) is flight:
                    del self._flights[key]

    async def _fly(self, key: bytes, ask: Callable[[], Awaitable[Verdict]]) -> Verdict:
        verdict = await ask()
        if verdict.value is not None and self._size:
            self._known[key] = verdict
            if len(self._known) > self._size:
                self._known.popitem(last=False)
        return verdict
