"""One call: its process, its pipes, and the watch over both."""

from __future__ import annotations

import fcntl
import marshal
import os
import select
import shutil
import signal
import subprocess
import sys
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

CHILD = Path(__file__).with_name("child.py")
# Hash seed: the same code prints the same sets. One thread each: the cores belong to the other calls.
ENVIRONMENT = {
    "PATH": "/usr/bin:/bin", "LANG": "C.UTF-8", "PYTHONHASHSEED": "0", "CUDA_VISIBLE_DEVICES": "",
    "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "MKL_NUM_THREADS": "1",
    "MALLOC_ARENA_MAX": "1",  # else every thread takes 64 MiB of the address space that it may have
}  # fmt: skip
RECORD_BYTES = 64 * 1024  # child.py writes less
SEALS = fcntl.F_SEAL_WRITE | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SHRINK
THREADS = 64  # each costs memory of the kernel, which the limit does not count, and a place in the table of processes
FILES = 256  # in the folder of a call that has one
# Longest waits between two looks at a call, and the shortest.
TICK_S, FILES_TICK_S, SHORTEST_S = 0.1, 0.005, 0.005
CORES = os.cpu_count() or 1  # processor time passes at most so many times as fast as time


@dataclass(frozen=True)
class Limits:
    wall_s: float
    cpu_s: float
    output_bytes: int
    files_bytes: int


@dataclass(frozen=True)
class Job:
    """What child.py is told. `rules`: a Landlock rule set's file descriptor or -1. `filter`: empty for no seccomp."""

    source: bytes
    limits: tuple[tuple[int, int], ...]
    rules: int
    filter: bytes
    modules: tuple[str, ...]  # that it may import beside the standard library
    folders: tuple[str, ...]  # where they are


class Call:
    """Started by the constructor, which raises OSError; `watch` blocks until it is over; `end` leaves nothing of it."""

    def __init__(self, job: Job, stdin: bytes, folder: Path | None):
        self.folder = folder
        self.fired = ""  # the limit that ended it: wall | cpu | output | threads | files | count
        self.code = 0  # of its exit; negative: the signal
        self.cpu_s = 0.0
        self.got = {"out": bytearray(), "err": bytearray(), "record": bytearray()}
        self._over = False  # it wrote more than is kept
        self._pipes: dict[int, str] = {}  # read end -> what comes out of it
        given: list[int] = []  # the child's ends: closed here once it has them
        try:
            for name in self.got:
                reading, writing = os.pipe()
                self._pipes[reading] = name
                given.append(writing)
                os.set_blocking(reading, False)
            out, err, record = given
            given.append(standard_input := _memory_file(stdin))
            facts = (job.source, os.getpid(), job.limits, job.rules, job.filter, record, job.modules, list(job.folders))
            given.append(told := _memory_file(marshal.dumps(facts)))
            home = str(folder or "/")
            self._process = subprocess.Popen(
                [sys.executable, "-P", "-s", "-S", "-B", str(CHILD), str(told)],
                stdin=standard_input, stdout=out, stderr=err,
                pass_fds=[record, told] + ([job.rules] if job.rules >= 0 else []),
                cwd=home, env=ENVIRONMENT | {"HOME": home, "TMPDIR": home}, start_new_session=True,
            )  # fmt: skip
        except BaseException:
            self._close()
            raise
        finally:
            for one in given:
                os.close(one)

    def watch(self, limits: Limits) -> None:
        """Until it has ended or broken a limit, which `fired` then names."""
        until = time.monotonic() + limits.wall_s
        poll = select.poll()
        for reading in self._pipes:
            poll.register(reading, select.POLLIN)
        tick_s = TICK_S if self.folder is None else FILES_TICK_S
        while not self._ended():
            left_s, cpu_left_s = until - time.monotonic(), limits.cpu_s - self._cpu_now()
            self.fired = "wall" if left_s <= 0 else "cpu" if cpu_left_s <= 0 else self._broken(limits)
            if self.fired:
                break
            wait_s = max(min(left_s, cpu_left_s / CORES, tick_s), SHORTEST_S)
            if not self._pipes:  # it closed all: on its way out, or so it looks
                wait_s = SHORTEST_S
            for reading, _ in poll.poll(1000 * wait_s):
                if not self._read(reading, limits):
                    poll.unregister(reading)
                    os.close(reading)
                    del self._pipes[reading]
        for reading in self._pipes:  # what it said before
            while self._read(reading, limits) and not self._over:
                pass
        self.fired = self.fired or self._broken(limits)

    def end(self) -> None:
        """Kill what lives, reap it, close the pipes, remove the folder."""
        pid = self._process.pid
        # The process is not reaped yet, so its number and its group's are still its own.
        with suppress(ProcessLookupError):
            os.killpg(pid, signal.SIGKILL)
        with suppress(ChildProcessError):
            _, status, used = os.wait4(pid, 0)
            self.code = self._process.returncode = os.waitstatus_to_exitcode(status)
            self.cpu_s = used.ru_utime + used.ru_stime
        self._close()

    def _close(self) -> None:
        for reading in self._pipes:
            os.close(reading)
        self._pipes.clear()
        if self.folder is not None:
            shutil.rmtree(self.folder, ignore_errors=True)

    def _ended(self) -> bool:
        return os.waitid(os.P_PID, self._process.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None

    def _cpu_now(self) -> float:
        """Processor seconds of all its threads, by the clock that the kernel keeps for every process."""
        try:
            return time.clock_gettime((~self._process.pid << 3) | 2)
        except OSError:  # it has just ended, or there is no such clock here: RLIMIT_CPU holds by itself
            return 0.0

    def _threads(self) -> int:
        try:
            with open(f"/proc/{self._process.pid}/stat") as file:
                return int(file.read().rpartition(")")[2].split()[17])
        except OSError:
            return 0

    def _read(self, reading: int, limits: Limits) -> bool:
        """Take what is there; False at the end of the stream. No more is kept than may be shown."""
        name = self._pipes[reading]
        try:
            data = os.read(reading, 1 << 16)
        except BlockingIOError:  # nothing now; and where a lone process escaped best_effort, the stream may never end
            return False
        got, room = self.got[name], RECORD_BYTES if name == "record" else limits.output_bytes
        self._over |= len(got) + len(data) > room
        got += data[: max(0, room - len(got))]
        return bool(data)

    def _broken(self, limits: Limits) -> str:
        """The limit that what it wrote or started has broken, or an empty string."""
        if self._over or len(self.got["out"]) + len(self.got["err"]) > limits.output_bytes:
            return "output"
        if self._threads() > THREADS:
            return "threads"
        if self.folder is None:
            return ""
        count = size = 0  # the folder is flat: nothing in it can be removed, renamed or made but files
        for entry in os.scandir(self.folder):
            count, size = count + 1, size + 512 * entry.stat(follow_symlinks=False).st_blocks
        return "count" if count > FILES else "files" if size > limits.files_bytes else ""


def _memory_file(content: bytes) -> int:
    """A file without a name that holds `content` and cannot be changed, read from its start. Raises OSError."""
    opened = os.memfd_create("jail", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    try:
        with open(opened, "wb", closefd=False) as file:
            file.write(content)
        fcntl.fcntl(opened, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SEAL | SEALS)
        os.lseek(opened, 0, os.SEEK_SET)
    except BaseException:
        os.close(opened)
        raise
    return opened
