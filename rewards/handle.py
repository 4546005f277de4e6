"""The pool's side of one reward process: start, talk with a deadline, ask where it hangs, kill."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import pickle
import re
import signal
import socket
import subprocess
import sys
import tempfile
from typing import Any

from rltk.errors import InfrastructureError
from rltk.rewards.process import CONCURRENT, HEADER, READY, STACKS_SIGNAL
from rltk.rewards.scorer import ScorerSpec

log = logging.getLogger("rltk.rewards")

LARGEST_MESSAGE = 1 << 28  # bytes; a longer one can only be a scorer's scribble on the socket


class ProcessEnded(Exception):
    """The process ended by itself; the message says how."""


class RewardProcess:
    """This side of one reward process (`rltk.rewards.process`)."""

    def __init__(self, memory_gib: float) -> None:
        ours, theirs = socket.socketpair()
        self._stacks = tempfile.TemporaryFile()  # noqa: SIM115 (closed in `kill`)
        arguments = (theirs.fileno(), self._stacks.fileno(), int(memory_gib * 2**30), os.getpid())
        # The interpreter looks where this one looks, as the scorer may be a file in the user's working directory. One
        # thread for BLAS: each thread's arena counts against the address space.
        path = os.pathsep.join(os.path.abspath(entry) for entry in sys.path)
        threads = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
        try:
            # A few ms of vfork and exec, on the loop's own thread: the child dies with the thread that started it.
            self._popen = subprocess.Popen(
                [sys.executable, "-u", "-P", "-m", "rltk.rewards.process", *map(str, arguments)],
                env={**os.environ, **threads, "PYTHONPATH": path},
                stdin=subprocess.DEVNULL,
                pass_fds=arguments[:2],
                start_new_session=True,
            )
        except BaseException:
            ours.close()
            self._stacks.close()
            raise
        finally:
            theirs.close()
        self._socket = ours
        self._writer: asyncio.StreamWriter | None = None
        self._reading: asyncio.Task[bytes] | None = None
        self.pid = self._popen.pid
        self.scored = 0
        self.concurrent = False  # the scorer is an async function: a chunk's samples run at once

    @classmethod
    async def start(
        cls, spec: ScorerSpec, deadline_s: float, memory_gib: float, start_deadline_s: float
    ) -> RewardProcess:
        """A process that has loaded the scorer. Raises InfrastructureError saying what stood in the way."""
        process = cls(memory_gib)
        try:
            problem = await process._load(spec, deadline_s, start_deadline_s)
            if problem:
                raise InfrastructureError(f"a reward process did not start: {problem}")
        except BaseException:  # a cancelled start leaves nothing behind either
            await process.kill()
            raise
        return process

    async def _load(self, spec: ScorerSpec, deadline_s: float, start_deadline_s: float) -> str:
        self._reader, self._writer = await asyncio.open_unix_connection(sock=self._socket)
        self.send((spec, deadline_s))
        try:
            answer = (await self.receive(start_deadline_s)).decode()
        except TimeoutError:
            return f"loading {spec.target} took over {start_deadline_s:g} s"
        except ProcessEnded as error:
            return f"loading {spec.target}: {error}"
        self.concurrent = answer == CONCURRENT
        return "" if answer in (READY, CONCURRENT) else answer

    def send(self, message: Any) -> None:
        assert self._writer is not None
        body = pickle.dumps(message)
        self._writer.write(HEADER.pack(len(body)))
        self._writer.write(body)

    async def receive(self, timeout_s: float) -> bytes:
        """The next message. Raises TimeoutError or ProcessEnded."""
        message = self._reading = self._reading or asyncio.create_task(self._read())
        # A second, short wait: when this event loop itself was held up, the message is there and the time is over.
        for patience in (max(0.0, timeout_s), 0.05):
            done, _ = await asyncio.wait({message}, timeout=patience)
            if done:
                self._reading = None
                try:
                    return message.result()
                except (asyncio.IncompleteReadError, OSError):
                    raise ProcessEnded(f"worker died ({await self.kill()})") from None
        raise TimeoutError

    async def _read(self) -> bytes:
        (size,) = HEADER.unpack(await self._reader.readexactly(HEADER.size))
        if size > LARGEST_MESSAGE:
            raise OSError("the scorer wrote to the pool's socket")
        return await self._reader.readexactly(size)

    async def stack(self) -> str:
        """The Python stack of the process's main thread, innermost frame first; empty where it cannot answer."""
        if self._popen.returncode is not None:
            return ""
        # The descriptor is shared with the process, its offset too.
        os.ftruncate(self._stacks.fileno(), 0)
        os.lseek(self._stacks.fileno(), 0, os.SEEK_SET)
        os.kill(self.pid, STACKS_SIGNAL)
        for _ in range(10):
            await asyncio.sleep(0.02)
            if size := os.fstat(self._stacks.fileno()).st_size:
                return os.pread(self._stacks.fileno(), size, 0).decode(errors="replace")
        return ""

    async def where(self) -> str:
        """file:line (function) that the process is in, or nothing."""
        frame = re.search(r'File "(.+)", line (\d+) in (\S+)', await self.stack())
        return f"{frame[1]}:{frame[2]} ({frame[3]})" if frame else ""

    async def kill(self) -> str:
        """End the process and its children, whatever they do; says how the process ended. May be called twice."""
        if self._reading is not None:
            self._reading.cancel()
        if self._popen.returncode is None:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(self.pid, signal.SIGKILL)  # before it is reaped: its id cannot be another's yet
        for _ in range(500):
            if self._popen.poll() is not None:
                break
            await asyncio.sleep(0.01)
        else:
            log.error("reward process %d did not end within 5 s of SIGKILL; it is left behind", self.pid)
        if self._writer is not None:
            self._writer.transport.abort()
        self._socket.close()
        self._stacks.close()
        return _exit_words(self._popen.returncode)


def _exit_words(code: int | None) -> str:
    if code is None:
        return "it could not be ended"
    if code >= 0:
        return f"exit code {code}"
    try:
        name = signal.Signals(-code).name
    except ValueError:
        name = f"signal {-code}"
    return f"{name}, perhaps from a machine out of memory" if -code == signal.SIGKILL else name
