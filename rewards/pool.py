"""A pool of killable reward processes with a deadline for every sample.

  score(batch) -> queue of samples -> slot 1 <-- private socket --> process 1   (killed, replaced, recycled)
                                   -> slot 2 <-- private socket --> process 2

A slot hands its process a chunk of samples and gets each result as it is done. So a sample that hangs, crashes or
eats its memory costs itself alone: its process is killed with its children, a fresh one starts, and the rest of the
chunk goes back to the queue. A shared channel with a lock (pebble, concurrent.futures) was rejected: a process killed
while it holds the lock takes the pool down. Everything runs on the caller's event loop; there is no thread.
"""

from __future__ import annotations

import asyncio
import logging
import pickle
from collections import Counter, deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

from rltk.errors import InfrastructureError
from rltk.rewards.handle import ProcessEnded, RewardProcess
from rltk.rewards.process import RESULT
from rltk.rewards.scorer import ScorerSpec, masked, timed_out
from rltk.trajectory import Record, RewardRecord, Trajectory

log = logging.getLogger("rltk.rewards")

LARGEST_CHUNK = 16  # samples; more gain nothing, and what is queued behind a slow sample could run elsewhere
ASYNC_GRACE_S = 1.0  # an async process ends its late samples itself; past this its event loop is blocked
START_ATTEMPTS = 3  # in a row, before samples are given up while no process is alive
FIRST_PAUSE_S, LONGEST_PAUSE_S = 0.1, 30.0  # between two attempts; it doubles
CLOSED = masked("not_scored", "not scored: the reward pool was closed")


@dataclass
class Job:
    payload: bytes  # pickled (Trajectory, Record)
    result: asyncio.Future[RewardRecord]
    alone: bool = False  # its process ended under it: it goes next in a chunk of its own, so that the blame is sure
    deaths: int = 0

    def settle(self, record: RewardRecord) -> None:
        if not self.result.done():  # else the batch gave up on it
            self.result.set_result(record)


class RewardPool:
    """Scores trajectories in `processes` killable processes. Belongs to one event loop; needs no Ray.

    `sample_deadline_s` bounds the scoring of one sample, `memory_gib` the address space of one process; a process is
    replaced after `samples_per_process` samples. Close it, or use it as an async context manager.
    """

    def __init__(
        self,
        spec: ScorerSpec,
        processes: int = 2,
        sample_deadline_s: float = 10.0,
        memory_gib: float = 2.0,
        samples_per_process: int = 10_000,
        start_deadline_s: float = 60.0,
    ) -> None:
        self._spec = spec
        self._size = processes
        self._sample_deadline_s = sample_deadline_s
        self._memory_gib = memory_gib
        self._samples_per_process = samples_per_process
        self._start_deadline_s = start_deadline_s
        self._jobs: deque[Job] = deque()
        self._arrived = asyncio.Event()
        self._processes: set[RewardProcess] = set()
        self._slots: list[asyncio.Task[None]] = []
        self._start_error = ""
        self._closed = False
        self._counts: Counter[str] = Counter()

    async def __aenter__(self) -> Self:
        await self.warm_up()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    async def warm_up(self) -> None:
        """Start the processes and wait until each has loaded the scorer. Raises InfrastructureError if one cannot."""
        while len(self._processes) < self._size:
            self._open()
            if self._start_error:
                raise InfrastructureError(self._start_error)
            await asyncio.sleep(0.01)

    async def score(
        self, items: Sequence[tuple[Trajectory, Record]], deadline_s: float | None = None
    ) -> list[RewardRecord]:
        """One RewardRecord for each item, in order; never raises for what a scorer does.

        `deadline_s` bounds the whole batch: samples not scored by then are masked. So a batch of nothing but hanging
        samples cannot hold up a training step longer than that.
        """
        if not items:
            return []
        self._open()
        loop = asyncio.get_running_loop()
        jobs = [Job(pickle.dumps(item), loop.create_future()) for item in items]
        self._jobs.extend(jobs)
        self._arrived.set()
        try:
            await asyncio.wait([job.result for job in jobs], timeout=deadline_s)
        finally:
            late = f"not scored before the batch's deadline of {deadline_s} s"
            late += f" ({self._start_error})" if self._start_error else ""
            for job in jobs:  # past the deadline, or the caller was cancelled
                job.settle(masked("not_scored", late))
        records = [job.result.result() for job in jobs]
        self._counts.update(str(record.detail.get("cause", "scored")) for record in records)
        return records

    def stats(self) -> dict[str, int]:
        """Records by cause ("scored", "timeout", "died", ...) and processes started, since the pool was made; the
        queue and the living processes, now."""
        return {**self._counts, "queued": len(self._jobs), "processes": len(self._processes)}

    async def stacks(self) -> str:
        """Where each process is now."""
        parts = [f"reward process {process.pid}:\n{await process.stack()}" for process in list(self._processes)]
        return "\n".join([f"reward pool: {self.stats()}", *parts])

    async def close(self) -> None:
        """Kill every process. Samples not scored yet are masked."""
        self._closed = True
        for slot in self._slots:
            slot.cancel()
        await asyncio.gather(*self._slots, return_exceptions=True)
        self._drop_queue(CLOSED)

    def _open(self) -> None:
        if self._closed:
            raise InfrastructureError("the reward pool is closed")
        if not self._slots:
            self._slots = [asyncio.create_task(self._slot(), name=f"reward slot {i}") for i in range(self._size)]

    async def _slot(self) -> None:
        """Keep one process alive and fed."""
        process = None
        chunk: list[Job] = []
        try:
            while True:
                process = process or await self._start_process()
                chunk = await self._take(process)
                try:
                    healthy = await self._score_chunk(process, chunk)
                except Exception as error:  # a mistake of the pool itself: say so, and keep the slot
                    log.exception("reward slot failed")
                    for job in chunk:
                        job.settle(masked("internal", f"the reward pool failed: {error!r}"))
                    healthy = False
                if not healthy or process.scored >= self._samples_per_process:
                    process = await self._end_process(process)
        finally:  # the pool is closing
            for job in chunk:
                job.settle(CLOSED)
            if process is not None:
                await self._end_process(process)

    async def _start_process(self) -> RewardProcess:
        """A process that has loaded the scorer, however long it takes: the batch's deadline bounds who waits for it."""
        attempt = 0
        while True:
            try:
                process = await RewardProcess.start(
                    self._spec, self._sample_deadline_s, self._memory_gib, self._start_deadline_s
                )
            except (InfrastructureError, OSError) as error:
                self._start_error = str(error)
            else:
                self._start_error = ""
                self._processes.add(process)
                self._counts["started"] += 1
                return process
            attempt += 1
            log.error("attempt %d: %s", attempt, self._start_error)
            if attempt >= START_ATTEMPTS and not self._processes:
                self._drop_queue(masked("no_process", self._start_error))
            await asyncio.sleep(min(LONGEST_PAUSE_S, FIRST_PAUSE_S * 2**attempt))

    async def _end_process(self, process: RewardProcess) -> None:
        self._processes.discard(process)
        await process.kill()

    async def _take(self, process: RewardProcess) -> list[Job]:
        """The next chunk: small enough that every process gets its share, one job if it is to go alone."""
        chunk: list[Job] = []
        while not chunk:
            while not self._jobs:
                self._arrived.clear()
                await self._arrived.wait()
            share = -(-len(self._jobs) // (2 * self._size))
            limit = min(share, self._spec.concurrency if process.concurrent else LARGEST_CHUNK)
            while self._jobs and len(chunk) < limit and not (chunk and self._jobs[0].alone):
                job = self._jobs.popleft()
                if not job.result.done():
                    chunk.append(job)
                    limit = 1 if job.alone else limit
        return chunk

    async def _score_chunk(self, process: RewardProcess, chunk: list[Job]) -> bool:
        """Score the jobs; what stays unfinished goes back to the queue. False: the process is not to be used again."""
        clock = asyncio.get_running_loop().time
        left = dict(enumerate(chunk))
        process.send([job.payload for job in chunk])
        # A plain scorer works in order, so its clock starts anew with every result; async samples all start now.
        budget = self._sample_deadline_s + (ASYNC_GRACE_S if process.concurrent else 0.0)
        end = clock() + budget
        while left:
            try:
                message = await process.receive(end - clock())
            except TimeoutError:
                verdict = timed_out(self._spec, self._sample_deadline_s, await process.where())
                self._blame(process, list(left.values()), verdict, chances=0)
                return False
            except ProcessEnded as error:  # perhaps killed from outside: one more chance
                self._blame(process, list(left.values()), masked("died", str(error)), chances=1)
                return False
            index, retires = RESULT.unpack_from(message)
            left.pop(index).settle(_unpickle(message[RESULT.size :]))
            process.scored += 1
            abandoned = left and all(job.result.done() for job in left.values())  # the batch gave up on them
            if retires or abandoned:
                self._requeue(list(left.values()))
                return False
            if not process.concurrent:
                end = clock() + budget
        return True

    def _blame(self, process: RewardProcess, left: list[Job], verdict: RewardRecord, chances: int) -> None:
        """The process ended with `left` unfinished: the one that was running gets the verdict, or one more chance; the
        others are scored again. Of several that ran at once nobody knows which it was: each goes again, alone."""
        running = left if process.concurrent else left[:1]
        for job in running:
            job.alone = True
        if len(running) == 1:
            running[0].deaths += 1
            if running[0].deaths > chances:
                running[0].settle(verdict)
        self._requeue([job for job in left if not job.result.done()])

    def _requeue(self, jobs: list[Job]) -> None:
        self._jobs.extendleft(reversed(jobs))
        self._arrived.set()

    def _drop_queue(self, record: RewardRecord) -> None:
        while self._jobs:
            self._jobs.popleft().settle(record)


def _unpickle(body: bytes) -> RewardRecord:
    try:
        return pickle.loads(body)
    except Exception as error:  # `detail` holds something that exists only over there
        return masked("exception", f"the RewardRecord cannot be unpickled: {type(error).__name__}: {error}")
