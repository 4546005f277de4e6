"""The reward process: a fresh interpreter that scores what it is sent, on its main thread (time limits need signals).

Started by `rltk.rewards.pool` as `python -P -m rltk.rewards.process SOCKET STACKS MEMORY PARENT`: two inherited file
descriptors, the address-space limit in bytes, the pool's process id. It imports neither torch nor ray.

  pool -> process   (ScorerSpec, deadline_s), once; then chunks: list[bytes], each a pickled (Trajectory, Record)
  process -> pool   READY, CONCURRENT (ready, and the scorer is async) or why it cannot start, once; then for each
                    sample, as it is done, RESULT (index in the chunk, 1 if this process retires) + pickled RewardRecord
Every message is preceded by its length (HEADER).
"""

from __future__ import annotations

import asyncio
import ctypes
import faulthandler
import inspect
import os
import pickle
import resource
import signal
import socket
import struct
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from rltk.errors import ConfigError
from rltk.rewards.scorer import Scorer, ScorerSpec, load_scorer, masked, timed_out
from rltk.trajectory import RewardRecord

HEADER = struct.Struct("!Q")
RESULT = struct.Struct("!IB")
READY, CONCURRENT = "ready", "concurrent"
STACKS_SIGNAL = signal.SIGUSR2


def main() -> None:
    socket_fd, stacks_fd, memory, parent = (int(argument) for argument in sys.argv[1:])
    _die_with(parent)
    # A C-level handler: it answers even while the scorer holds the GIL, so that a time-out can say where it hangs.
    faulthandler.register(STACKS_SIGNAL, file=stacks_fd, all_threads=False)
    resource.setrlimit(resource.RLIMIT_AS, (memory, memory))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    link = socket.socket(fileno=socket_fd)
    spec, deadline_s = pickle.loads(_receive(link))
    try:
        scorer = load_scorer(spec)
    except MemoryError:
        _send(link, f"loading {spec.target} needs more than {memory / 2**30:g} GiB; raise reward.memory_gib".encode())
        return
    except ConfigError as error:
        _send(link, str(error).encode())
        return
    except BaseException as error:
        _send(link, f"loading {spec.target} raised {type(error).__name__}: {error}".encode())
        return
    _send(link, (CONCURRENT if inspect.iscoroutinefunction(scorer) else READY).encode())
    Server(link, spec, scorer, deadline_s, memory).run()


class Server:
    """Scores chunk after chunk until the pool closes the link, or until the memory limit was met once."""

    def __init__(self, link: socket.socket, spec: ScorerSpec, scorer: Scorer, deadline_s: float, memory: int) -> None:
        self.link, self.spec, self.scorer, self.deadline_s = link, spec, scorer, deadline_s
        self.memory_reason = f"out of memory: the scorer needed more than {memory / 2**30:g} GiB (reward.memory_gib)"
        self.retired = False
        # One loop for the life of the process: a user's async client is bound to the loop it first ran in.
        self.loop = asyncio.new_event_loop() if inspect.iscoroutinefunction(scorer) else None

    def run(self) -> None:
        while not self.retired:
            try:
                chunk: list[bytes] = pickle.loads(_receive(self.link))
            except EOFError:
                return
            if self.loop is not None:
                self.loop.run_until_complete(self._score_concurrently(chunk))
                continue
            for index, job in enumerate(chunk):
                self._answer(index, lambda job=job: self._score(job))
                if self.retired:
                    return

    def _score(self, job: bytes) -> Any:  # a RewardRecord, or the promise of one where the scorer is async
        return self.scorer(*pickle.loads(job))

    async def _score_concurrently(self, chunk: list[bytes]) -> None:
        async def one(index: int, job: bytes) -> None:
            started = time.perf_counter()
            try:
                record = await asyncio.wait_for(self._score(job), self.deadline_s)
            except TimeoutError:  # the scorer's own TimeoutError is already a record
                record = timed_out(self.spec, self.deadline_s)
            except MemoryError:
                record = masked("memory", self.memory_reason)
                self.retired = True
            self._answer(index, lambda: record, time.perf_counter() - started)

        await asyncio.gather(*(one(index, job) for index, job in enumerate(chunk)))

    def _answer(self, index: int, score: Callable[[], RewardRecord], seconds: float | None = None) -> None:
        started = time.perf_counter()
        try:
            record = score()
        except MemoryError:
            # What the scorer left behind is unknown: answer, then make room for a fresh process.
            record, self.retired = masked("memory", self.memory_reason), True
        record = replace(record, seconds=time.perf_counter() - started if seconds is None else seconds)
        try:
            body = pickle.dumps(record)
        except Exception as error:
            body = pickle.dumps(masked("exception", f"the RewardRecord cannot be pickled: {error}"))
        _send(self.link, RESULT.pack(index, self.retired) + body)


def _die_with(parent: int) -> None:
    """Be killed when the pool's process ends, even in the middle of a hanging scorer (Linux)."""
    if sys.platform == "linux":
        pr_set_pdeathsig = 1
        ctypes.CDLL(None).prctl(pr_set_pdeathsig, signal.SIGKILL)
    if os.getppid() != parent:  # it ended before the line above
        os._exit(1)


def _receive(link: socket.socket) -> bytes:
    (size,) = HEADER.unpack(_read(link, HEADER.size))
    return _read(link, size)


def _read(link: socket.socket, size: int) -> bytes:
    parts = bytearray()
    while len(parts) < size:
        part = link.recv(min(size - len(parts), 1 << 20))
        if not part:
            raise EOFError
        parts += part
    return bytes(parts)


def _send(link: socket.socket, body: bytes) -> None:
    link.sendall(HEADER.pack(len(body)) + body)


if __name__ == "__main__":
    main()
