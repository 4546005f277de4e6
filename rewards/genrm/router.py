"""Router: which replica of the judge answers which prompt.

  session.ask(prompt) -> queue (bounded, oldest question first) -> the least loaded replica whose breaker lets it in
                           ^                                                   |
                           +---- on failure: a pause, then another replica ----+-> Reply, or JudgeUnavailable(cause)

rewards/genrm/session.py: one question's way through, with its deadline and what it may not ask twice.
"""

from __future__ import annotations

import asyncio
import heapq
import itertools
import logging
import random
import secrets
from collections import Counter
from collections.abc import Awaitable, Callable, Coroutine, Sequence
from dataclasses import dataclass, field
from typing import Any

from rltk.rewards.genrm.breaker import Breaker
from rltk.rewards.genrm.options import GenRMOptions
from rltk.rewards.genrm.replica import FINAL, SUSPECT, Backend, Replica, ReplicaGone, result, stacks
from rltk.rewards.genrm.session import Session
from rltk.rewards.genrm.types import JudgeUnavailable, Prompt, Reply

log = logging.getLogger("rltk.genrm")

PAUSE_S = 0.25  # before a retry, doubled with each, times .5 to 1.5: those who failed together do not return together
RESTART_AFTER = 2  # openings of a breaker in a row: the replica does not come back by itself


@dataclass(order=True)
class Waiter:
    """In the queue, by the age of its question."""

    number: int
    count: int  # of all places asked for, as a question may ask for two at once
    session: Session = field(compare=False)
    tried: Sequence[str] = field(compare=False)
    place: asyncio.Future[tuple[Replica, bool]] = field(compare=False)  # and whether it is a breaker's trial


class Router:
    """Belongs to one event loop. Names of backends differ."""

    def __init__(self, backends: Sequence[Backend], options: GenRMOptions) -> None:
        self._options = options
        self._replicas = [
            Replica(backend, Breaker(options.breaker_failures, options.breaker_pause_s)) for backend in backends
        ]
        self._queue: list[Waiter] = []  # a heap; those who gave up leave it late
        self._waiting = self._most_waiting = 0
        self._counts: Counter[str] = Counter()
        self._numbers, self._places = itertools.count(), itertools.count()
        self._prefix = secrets.token_hex(3)  # a replica may still run what an earlier router of this name asked
        self._background: set[asyncio.Task[None]] = set()

    @property
    def names(self) -> list[str]:
        return [replica.backend.name for replica in self._replicas]

    def session(self, uid: str, deadline: float, only: str | None = None) -> Session:
        """One question's way: until `deadline` (of time.monotonic), on the replica `only` if one is named."""
        return Session(self, next(self._numbers), uid, deadline, only)

    async def ready(self) -> None:
        """When every replica answers. Raises what keeps one from it."""
        await asyncio.gather(*(replica.backend.ready() for replica in self._replicas))

    def stats(self) -> dict[str, Any]:
        """Generations asked, answered, cancelled, failed (by cause), tries after the first, tokens; who waits and runs
        now, the most that waited at once; and of each replica its state. asked = answered + cancelled + failed +
        in_flight, always."""
        failed = {name[7:]: n for name, n in self._counts.items() if name.startswith("failed:")}
        counts = {name: self._counts[name] for name in ("asked", "answered", "cancelled", "retries", "tokens")}
        ended = counts["answered"] + counts["cancelled"] + sum(failed.values())
        return {
            **counts,
            "failed": failed,
            "in_flight": counts["asked"] - ended,
            "waiting": self._waiting,
            "most_waiting": self._most_waiting,
            "replicas": [
                {
                    "name": replica.backend.name, "state": replica.state,
                    "load": replica.load, "answered": replica.answered, "failed": replica.failed,
                    "unread": replica.unread,
                }
                for replica in self._replicas
            ],
        }  # fmt: skip

    async def stacks(self) -> str:
        return "\n".join(await asyncio.gather(*(stacks(replica.backend) for replica in self._replicas)))

    async def close(self) -> None:
        for task in self._background:
            task.cancel()
        await asyncio.gather(*self._background, return_exceptions=True)
        await asyncio.gather(*(replica.backend.close() for replica in self._replicas))

    # -- one generation ------------------------------------------------------------------------------------------------

    async def generate(self, session: Session, prompt: Prompt, avoid: Sequence[str]) -> Reply:
        """See Session.ask."""
        self._counts["asked"] += 1
        ended = "cancelled"
        try:
            reply = await self._generate(session, prompt, list(avoid))
            ended = "answered"
            self._counts["tokens"] += reply.tokens
            return reply
        except JudgeUnavailable as error:
            ended = f"failed:{error.cause}"
            raise
        finally:
            self._counts[ended] += 1

    async def _generate(self, session: Session, prompt: Prompt, tried: list[str]) -> Reply:
        words: list[str] = []
        cause = "unavailable"
        for attempt in range(self._options.retries + 1):
            if attempt:
                pause = PAUSE_S * 2 ** (attempt - 1) * random.uniform(0.5, 1.5)
                if pause >= session.left:
                    break
                self._counts["retries"] += 1
                await asyncio.sleep(pause)
            try:
                replica, trial = await self._place(session, tried)
            except JudgeUnavailable as error:
                cause, words = error.cause, [*words, str(error)]
                break
            try:
                return await self._try(replica, trial, session, prompt)
            except JudgeUnavailable as error:
                cause, words = error.cause, [*words, str(error)]
                if cause in FINAL:
                    break
                tried.append(replica.backend.name)
        raise JudgeUnavailable(cause, f"question {session.uid}: {'; '.join(words)}")

    async def _try(self, replica: Replica, trial: bool, session: Session, prompt: Prompt) -> Reply:
        """One attempt on the place that was given; frees it."""
        backend, breaker = replica.backend, replica.breaker
        limit = min(self._options.attempt_s, max(session.left, 0.0))
        uid = f"{self._prefix}.{next(self._places)}.{session.uid}"
        work = asyncio.ensure_future(backend.generate(prompt, limit, uid))
        work.add_done_callback(_heard)
        blame = False
        try:
            await asyncio.wait({work}, timeout=limit)
            if not work.done():
                # With little time for itself, nobody can tell whether the replica is slow or the question was late.
                blame = limit >= self._options.attempt_s / 2
                raise JudgeUnavailable("timeout", f"{backend.name} did not answer within {limit:.1f} s")
            reply = result(work, backend.name)
            breaker.success(trial)
            replica.answer()
            return reply
        except JudgeUnavailable as error:
            blame = blame or (work.done() and error.cause not in FINAL)
            if isinstance(error, ReplicaGone) and not replica.away:
                self._send_away(replica, backend.returned)
            raise
        finally:
            work.cancel()  # late, or whoever asked has gone: it stops there, and nobody here waits for that
            replica.load -= 1
            if blame:
                self._blame(replica, trial)
            else:
                breaker.abandon(trial)  # says nothing after a success
            self._dispatch()

    # -- places --------------------------------------------------------------------------------------------------------

    async def _place(self, session: Session, tried: Sequence[str]) -> tuple[Replica, bool]:
        """A free place for the question. Raises JudgeUnavailable: queue_full (new questions only: one that has begun is
        not dropped half-way), timeout, or unavailable if no replica stood then."""
        if self._waiting >= self._options.queue and not session.begun and not self._room():
            raise JudgeUnavailable("queue_full", f"{self._waiting} questions wait (reward.genrm.queue)")
        for replica in self._replicas:
            if replica.backend.name == session.only and replica.resting:
                raise replica.refusal()
        session.begun = True
        place: asyncio.Future[tuple[Replica, bool]] = asyncio.get_running_loop().create_future()
        heapq.heappush(self._queue, Waiter(session.number, next(self._places), session, tuple(tried), place))
        self._waiting += 1
        self._dispatch()
        if not place.done():
            self._most_waiting = max(self._most_waiting, self._waiting)
        try:
            async with asyncio.timeout(max(session.left, 0.0)):
                return await place
        except BaseException as error:
            if place.done() and not place.cancelled() and place.exception() is None:  # given in the same moment
                replica, trial = place.result()
                replica.load -= 1
                replica.breaker.abandon(trial)
                self._dispatch()
            if not isinstance(error, TimeoutError):
                raise
            if any(r.usable and session.only in (None, r.backend.name) for r in self._replicas):
                raise JudgeUnavailable("timeout", "no place was free before its deadline") from None
            raise JudgeUnavailable("unavailable", "no replica stood before its deadline") from None
        finally:
            self._waiting -= 1
            if len(self._queue) > 2 * self._waiting + 64:  # while no replica stands, nothing else takes them out
                self._queue = [waiter for waiter in self._queue if not waiter.place.done()]
                heapq.heapify(self._queue)

    def _room(self) -> bool:
        return any(r.usable and r.load < r.backend.slots for r in self._replicas)

    def _dispatch(self) -> None:
        """Give free places to those who wait, the oldest question first."""
        passed: list[Waiter] = []
        while self._queue and self._room():
            waiter = heapq.heappop(self._queue)
            if waiter.place.done():
                continue
            replica = self._choose(waiter)
            if replica is None:
                passed.append(waiter)
                continue
            replica.load += 1
            waiter.place.set_result((replica, replica.breaker.begin()))
        for waiter in passed:
            heapq.heappush(self._queue, waiter)

    def _choose(self, waiter: Waiter) -> Replica | None:
        """The least loaded of those where it failed least often, one that writes garbage last; None: those are full."""
        only = waiter.session.only
        usable = [r for r in self._replicas if r.usable and only in (None, r.backend.name)]
        fewest = min((waiter.tried.count(r.backend.name) for r in usable), default=0)
        free = [r for r in usable if waiter.tried.count(r.backend.name) == fewest and r.load < r.backend.slots]
        best = min((r.unread for r in usable), default=0.0)
        return min(free, key=lambda r: (r.unread > best + SUSPECT, r.load / r.backend.slots, r.answered), default=None)

    def asked_again(self, name: str) -> None:
        """Nobody could read what this replica wrote."""
        for replica in self._replicas:
            if replica.backend.name == name:
                replica.asked_again()

    # -- replicas that fail --------------------------------------------------------------------------------------------

    def _blame(self, replica: Replica, trial: bool) -> None:
        replica.failed += 1
        if replica.breaker.failure(trial):
            pause_s = replica.breaker.pause_s
            log.error("judge %s fails; it is left alone for %.1f s", replica.backend.name, pause_s)
            asyncio.get_running_loop().call_later(pause_s + 0.01, self._dispatch)
            self._refuse_those_who_wait_for(replica)
            self._spawn(self._look_after(replica))

    async def _look_after(self, replica: Replica) -> None:
        """Write down what it was doing; restart it if it does not come back by itself."""
        log.error("%s", await stacks(replica.backend))
        if replica.breaker.openings >= RESTART_AFTER and not replica.away:
            self._send_away(replica, replica.backend.restart)

    def _send_away(self, replica: Replica, back: Callable[[], Awaitable[bool]]) -> None:
        """It gets no questions until `back` returns, and starts anew if that is true."""
        replica.away = True
        self._refuse_those_who_wait_for(replica)
        self._spawn(self._await_return(replica, back))

    async def _await_return(self, replica: Replica, back: Callable[[], Awaitable[bool]]) -> None:
        try:
            async with asyncio.timeout(self._options.start_s):
                if await back():
                    replica.breaker.success(trial=False)
                    replica.unread = 0.0
        except Exception as error:
            log.error("judge %s did not come back: %r", replica.backend.name, error)
        finally:
            replica.away = False
            self._dispatch()

    def _refuse_those_who_wait_for(self, replica: Replica) -> None:
        """Who may ask nobody else does not wait for it."""
        for waiter in self._queue:
            if waiter.session.only == replica.backend.name and not waiter.place.done():
                waiter.place.set_exception(replica.refusal())

    def _spawn(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.ensure_future(work)
        self._background.add(task)
        task.add_done_callback(self._background.discard)


def _heard(work: asyncio.Future[Reply]) -> None:
    """Of a reply that nobody waits for any more; unheard errors are printed at odd moments."""
    if not work.cancelled():
        work.exception()
