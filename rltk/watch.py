"""Named waits with deadlines: nothing hangs in silence.

A leaf (standard library only). Every wait across processes goes through `wait` (asyncio) or `get` (blocking, Ray):
when the deadline passes, the log says who waits for whom and since when, the stacks of this process are dumped, the
stacks of the awaited role are asked for where that is possible, and a DeadlineError is raised.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import sys
import threading
import time
import traceback
from collections.abc import Awaitable, Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, TypeVar

from rltk.errors import DeadlineError

log = logging.getLogger("rltk.watch")
T = TypeVar("T")


@dataclass(frozen=True)
class Wait:
    """One wait that is going on: `owner` waits for `target`, doing `name`, since `since` (time.monotonic)."""

    name: str
    owner: str
    target: str
    deadline: float  # seconds from `since`
    since: float

    def describe(self) -> str:
        waited = time.monotonic() - self.since
        return f"{self.owner} waits for {self.target} ({self.name}) since {waited:.1f} s, deadline {self.deadline:g} s"


_waits: dict[int, Wait] = {}
_lock = threading.Lock()


def waits() -> list[str]:
    """What this process waits for now, oldest first."""
    with _lock:
        return [w.describe() for w in sorted(_waits.values(), key=lambda w: w.since)]


def stacks() -> str:
    """The stack of every thread of this process, and its waits: what a watcher prints of a role that is late."""
    names = {t.ident: t.name for t in threading.enumerate()}
    parts = [f"waits: {waits() or 'none'}"]
    for ident, frame in sys._current_frames().items():
        parts.append(f"thread {names.get(ident, ident)}:\n" + "".join(traceback.format_stack(frame)))
    return "\n".join(parts)


@contextlib.contextmanager
def _registered(name: str, owner: str, target: str, deadline: float) -> Iterator[Wait]:
    entry = Wait(name, owner, target, deadline, time.monotonic())
    with _lock:
        _waits[id(entry)] = entry
    try:
        yield entry
    finally:
        with _lock:
            _waits.pop(id(entry), None)


def _late(entry: Wait, remote_stacks: str) -> DeadlineError:
    log.error("deadline passed: %s\nother waits here: %s\n%s\n%s", entry.describe(), waits(), stacks(), remote_stacks)
    return DeadlineError(
        f"{entry.target} did not finish {entry.name!r} within {entry.deadline:g} s ({entry.owner} waited; stacks are "
        "in the log). If the work is only slow, raise the matching key under `deadlines`."
    )


async def wait(
    awaitable: Awaitable[T],
    name: str,
    owner: str,
    target: str,
    deadline: float,
    peek: Callable[[], Awaitable[str]] | None = None,
) -> T:
    """Await with a name and a deadline in seconds. `peek` asks the late role for its stacks (5 s at most)."""
    with _registered(name, owner, target, deadline) as entry:
        try:
            return await asyncio.wait_for(_as_coroutine(awaitable), deadline)
        except TimeoutError:
            remote = "the late role was not asked for its stacks"
            if peek is not None:
                try:
                    remote = f"stacks of {target}:\n" + await asyncio.wait_for(_as_coroutine(peek()), 5)
                except Exception as error:  # the role may be dead or stuck: that is itself the news
                    remote = f"{target} did not answer with its stacks: {error!r}"
            raise _late(entry, remote) from None


async def _as_coroutine(awaitable: Awaitable[T]) -> T:
    return await awaitable


def get(
    refs: Any,
    name: str,
    owner: str,
    target: str,
    deadline: float,
    peek: Iterable[Any] = (),
    poll: Callable[[], None] | None = None,
) -> Any:
    """`ray.get` with a name and a deadline in seconds.

    `peek`: actor handles with a `stacks` method, asked when the deadline passes. `poll` is called about twice a second
    while waiting (progress views). Errors of the remote call come through as they are.
    """
    import ray  # only callers inside Ray reach this line; the module stays importable without it

    many = isinstance(refs, (list, tuple))
    pending = list(refs) if many else [refs]
    with _registered(name, owner, target, deadline) as entry:
        waiting = pending
        while waiting:
            left = deadline - (time.monotonic() - entry.since)
            if left <= 0:
                raise _late(entry, _remote_stacks(target, peek))
            done, waiting = ray.wait(waiting, num_returns=len(waiting), timeout=min(0.5 if poll else 5.0, left))
            if poll is not None:
                poll()
            for ref in done:
                ray.get(ref)  # raises at once, while others still run
    return ray.get(pending) if many else ray.get(pending[0])


def _remote_stacks(target: str, actors: Iterable[Any]) -> str:
    import ray

    parts = []
    for actor in actors:
        try:
            stacks = ray.get(actor.stacks.remote(), timeout=5)
            parts.append(f"stacks of {target}:\n{stacks}")
        except Exception as error:  # dead or stuck: that is itself the news
            parts.append(f"{target} did not answer with its stacks: {error!r}")
    return "\n".join(parts)
