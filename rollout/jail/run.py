"""The jail: options in, a typed result for each call out."""

from __future__ import annotations

import math
import os
import resource
import signal
import time
import weakref
from collections.abc import Sequence
from pathlib import Path

from rltk.errors import ConfigError
from rltk.rollout.jail import landlock, paths, seccomp
from rltk.rollout.jail.call import FILES, THREADS, Call, Job, Limits
from rltk.rollout.jail.capabilities import capabilities
from rltk.rollout.jail.folders import Folders
from rltk.rollout.jail.text import shown
from rltk.rollout.tools.options import JailOptions
from rltk.rollout.tools.types import Status, ToolResult

OPEN_FILES, STACK_MIB = 64, 8
MIB = 2**20
FIRED: dict[str, tuple[Status, str]] = {
    "wall": ("timeout", "wall {wall_s:g} s"),
    "output": ("output_limit", "output {options.output_kib} KiB"),
    "files": ("output_limit", "files {options.files_mib} MiB"),
    "count": ("output_limit", f"files {FILES}"),
    "threads": ("killed", f"threads {THREADS}"),
}
# A trial call, at the start: what it tries must fail where the machine is said to confine it.
TRIAL = """
import os

def fork():
    pid = os.fork()
    if pid == 0:
        os._exit(0)
    os.waitpid(pid, 0)

for name, attempt in (("seccomp", fork), ("landlock", lambda: os.listdir("/"))):
    try:
        attempt()
    except OSError:
        continue
    print(name)
"""


class Jail:
    """Runs Python that nobody trusts. Any number of calls at once, from any threads; a call blocks its thread.

    `level`: "strict", or "best_effort: without ..." and what is missing; it belongs into the run's record.
    `packages`: distributions that the code may import beside the standard library, with all they require.
    Raises ConfigError where isolation=strict and this machine cannot, or a trial call is not confined.
    """

    def __init__(self, options: JailOptions, packages: Sequence[str] = paths.PACKAGES):
        able = capabilities()
        _check(options, able.missing)
        self.options, self.level = options, able.level
        self._landlock = able.landlock
        self._readable = paths.readable(tuple(packages))
        paths.compile_missing(self._readable)
        self._filter = seccomp.program(writes=able.landlock > 0) if able.seccomp else b""
        self._folders = Folders() if options.files_mib > 0 else None
        # One set of rules serves all calls, unless each has a folder of its own.
        self._rules = self._ruleset() if self._folders is None else -1
        if self._rules >= 0:
            weakref.finalize(self, os.close, self._rules)
        self._prove(able.missing)

    def run(self, source: str, stdin: str = "", deadline_s: float | None = None) -> ToolResult:
        """Run `source` as a program. `text` is what it printed and, after an error, the short traceback.

        `deadline_s`: wall seconds it may have, where they are fewer than cpu_s * wall_factor. What the code does never
        raises here. `infra_error`: this machine could not start it, and `text` is for the log.
        """
        start = time.monotonic()
        wall_s = self.options.cpu_s * self.options.wall_factor
        wall_s = wall_s if deadline_s is None else min(wall_s, deadline_s)
        limits = Limits(wall_s, self.options.cpu_s, self.options.output_kib * 1024, self.options.files_mib * MIB)
        try:
            call = self._start(source.encode(errors="replace"), stdin.encode(errors="replace"))
        except OSError as error:
            return ToolResult("infra_error", f"the jail could not start a process: {error}")
        try:
            call.watch(limits)
        except ChildProcessError:  # where SIGCHLD is ignored, the kernel reaps before anyone has seen how it ended
            return ToolResult("infra_error", "something else in this process takes the exit codes of its children")
        finally:
            call.end()
        status, text, limit = self._verdict(call, limits)
        return ToolResult(status, text, limit, run_s=time.monotonic() - start, cpu_s=call.cpu_s)

    def _start(self, source: bytes, stdin: bytes) -> Call:
        rules, folder = self._rules, None
        if self._folders is not None:
            folder = self._folders.make()
            rules = self._ruleset(folder)
        try:
            may = self._readable
            job = Job(source, _rlimits(self.options), rules, self._filter, may.modules, may.folders)
            return Call(job, stdin, folder)
        finally:
            if rules >= 0 and rules != self._rules:
                os.close(rules)

    def _ruleset(self, *writable: Path) -> int:
        if not self._landlock:
            return -1
        may = self._readable
        return landlock.ruleset(self._landlock, may.files, may.listings, (*paths.DEVICES, *writable))

    def _verdict(self, call: Call, limits: Limits) -> tuple[Status, str, str]:
        """(status, text, limit): `ok` only with a completion record. That can be forged; no reward comes of it."""
        text = shown(bytes(call.got["out"]), self._readable.hidden)
        started, ended, said = (call.got["record"].decode(errors="replace").split("\n", 2) + ["", ""])[:3]
        if started != "started":  # and so it is not the code's doing
            why = call.fired and f", past its {call.fired} limit" or f", exit {call.code}"
            log = call.got["err"].decode(errors="replace")[-2000:]
            return "infra_error", f"the jail's process ended before the code ran{why}: {log}", ""
        if call.fired == "cpu" or (call.code == -signal.SIGKILL and call.cpu_s >= limits.cpu_s):
            return "timeout", text, f"cpu {limits.cpu_s:g} s"
        if call.fired:
            status, limit = FIRED[call.fired]
            return status, text, limit.format(options=self.options, wall_s=limits.wall_s)
        if call.code < 0:
            return "killed", text, f"signal {_signal(-call.code)}"
        if ended == "ok" and call.code == 0:
            return "ok", text, ""
        said = shown(said.encode(), self._readable.hidden) if ended else f"the program ended itself, exit {call.code}"
        text = f"{text.rstrip()}\n{said}".lstrip("\n")
        return ("oom", text, f"memory {self.options.memory_mib} MiB") if ended == "oom" else ("error", text, "")

    def _prove(self, missing: dict[str, str]) -> None:
        result = self.run(TRIAL, deadline_s=30.0)
        if result.status != "ok":
            raise ConfigError(f"the jail's trial call failed ({result.status} {result.limit}): {result.text}")
        open_doors = [name for name in result.text.split() if name not in missing]
        if open_doors:
            raise ConfigError(f"this machine has {', '.join(open_doors)}, and jailed code is not held by it")


def _check(options: JailOptions, missing: dict[str, str]) -> None:
    """Raises ConfigError where the options and this machine do not go together."""
    if options.isolation not in ("strict", "best_effort"):
        raise ConfigError(f"tools.jail.isolation={options.isolation!r} runs no code here; strict and best_effort do")
    if options.isolation == "strict" and missing:
        said = "; ".join(f"{name}: {fix}" for name, fix in missing.items())
        raise ConfigError(
            f"tools.jail.isolation=strict needs what this machine has not. {said}. Or accept less with "
            "tools.jail.isolation=best_effort, or run code elsewhere with tools.jail.isolation=remote"
        )
    if options.files_mib > 0 and missing:  # the quota and the folder's walls are theirs
        raise ConfigError(
            f"tools.jail.files_mib={options.files_mib} needs landlock and seccomp, and this machine is without "
            f"{' and '.join(missing)}: code could write anywhere. Set tools.jail.files_mib=0"
        )


def _signal(number: int) -> str:
    """Its name; real-time signals have none."""
    return signal.Signals(number).name if number in set(signal.Signals) else str(number)


def _rlimits(options: JailOptions) -> tuple[tuple[int, int], ...]:
    """Never RLIMIT_NPROC: it counts all processes of the user."""
    return (
        (resource.RLIMIT_AS, options.memory_mib * MIB),
        (resource.RLIMIT_CPU, math.ceil(options.cpu_s) + 1),  # should the parent look away; it fires first
        (resource.RLIMIT_FSIZE, options.files_mib * MIB),
        (resource.RLIMIT_NOFILE, OPEN_FILES),
        (resource.RLIMIT_STACK, STACK_MIB * MIB),
        (resource.RLIMIT_CORE, 0),
    )
