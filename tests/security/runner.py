"""Runs attacks one after the other in a world of its own, and looks for harm after each. One line of JSON for each.

    python -m tests.security.runner SCRATCH < names.json

It is the parent whom the attacks attack; every process that they leave behind becomes its child.
"""

from __future__ import annotations

import ctypes
import hashlib
import json
import os
import resource
import select
import signal
import socket
import sys
import sysconfig
import tempfile
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from unittest import mock

from rltk.rollout.jail import Capabilities, Jail, capabilities
from rltk.rollout.tools.options import JailOptions
from rltk.rollout.tools.types import ToolResult
from tests.security.attack import ATTACKS, PRELUDE, SECRET, Attack

SET_CHILD_SUBREAPER = 36
SLACK_S = 20.0  # beyond a call's wall limit, on a machine where much else runs
MARK = "rltk-attack"  # what attacks call the files they try to make
KEY = "4242"  # and the key of what they leave in the kernel


class World:
    """Secrets, listeners, and the parent's own state, as they were before an attack."""

    def __init__(self, scratch: Path):
        self.outside, home, temporary = (scratch / name for name in ("outside", "home", "temporary"))
        for folder in (self.outside, home / ".ssh", temporary):
            folder.mkdir(parents=True)
        for file in ("secret.txt", "answer.json"):
            (self.outside / file).write_text(SECRET)
        (self.outside / "secret_module.py").write_text(f"ANSWER = {SECRET!r}\n")
        (home / ".ssh" / "id_rsa").write_text(SECRET)
        for path in [self.outside, *self.outside.iterdir()]:
            path.chmod(0o777)  # so that nothing but the jail stands before them
        os.environ |= {"HF_TOKEN": SECRET, "HOME": str(home), "TMPDIR": str(temporary)}
        tempfile.tempdir = None
        self.listeners = [
            _listener(socket.AF_INET, socket.SOCK_STREAM, ("127.0.0.1", 0)),
            _listener(socket.AF_INET, socket.SOCK_DGRAM, ("127.0.0.1", 0)),
            _listener(socket.AF_UNIX, socket.SOCK_STREAM, str(self.outside / "socket")),
            _listener(socket.AF_UNIX, socket.SOCK_STREAM, f"\0{MARK}-{os.getpid()}"),
        ]
        self.facts = {
            "parent": os.getpid(), "outside": str(self.outside), "home": str(home),
            "tcp": self.listeners[0].getsockname()[1], "udp": self.listeners[1].getsockname()[1],
        }  # fmt: skip
        self.scratch = scratch
        self.places = [Path(place) for place in ("/", "/tmp", "/var/tmp", "/dev/shm", sysconfig.get_path("stdlib"))]
        self.before: dict[str, object] = {}

    def state(self) -> dict[str, object]:
        return {
            "the parent's limits": [resource.getrlimit(which) for which in range(16)],
            "the parent's priority": (os.getpriority(os.PRIO_PROCESS, 0), os.sched_getscheduler(0)),
            "the parent's cores": os.sched_getaffinity(0),
            "files outside": _digest(self.scratch),
            "files in shared places": sorted(str(f) for place in self.places for f in place.glob(MARK + "*")),
            "System V objects": [kind for kind in ("shm", "msg", "sem") if _has_key(Path("/proc/sysvipc", kind))],
            "living children": _children(),
            "connections and signals": (len(select.select(self.listeners, [], [], 0)[0]), signal.sigpending()),
        }

    def harm(self, attack: Attack, result: ToolResult) -> list[str]:
        """Everything wrong after an attack; empty where it was held."""
        after = self.state()
        found = [f"{name}: {value}" for name, value in after.items() if value != self.before[name]]
        marks = ("ESCAPED", SECRET, sysconfig.get_path("stdlib"))
        found += [f"text has {mark!r}" for mark in marks if mark in result.text]
        if any(ord(one) < 32 and one not in "\n\t" or 127 <= ord(one) < 160 for one in result.text):
            found.append("text has control characters")
        if result.status not in attack.ends:
            found.append(f"ended as {result.status}, not {' or '.join(attack.ends)}: {result.text[-300:]}")
        if result.run_s > attack.wall_s + SLACK_S:
            found.append(f"took {result.run_s:.1f} s")
        return found


def main() -> None:
    names, walls = json.load(sys.stdin)
    ctypes.CDLL(None).prctl(SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    world = World(Path(sys.argv[1]))
    jails = {name: _jail(_options(ATTACKS[name], walls), tuple(walls)) for name in names}
    world.before = world.state()
    for name, jail in jails.items():
        attack = ATTACKS[name]
        source = attack.source if attack.bare else PRELUDE.format(**world.facts) + attack.source
        result = jail.run(source, deadline_s=attack.wall_s)
        line = {"name": name, "status": result.status, "limit": result.limit, "harm": world.harm(attack, result)}
        print(json.dumps(line | {"text": result.text[-200:], "run_s": result.run_s}), flush=True)
        for child in _children():  # what got out must not outlive the test that shows it
            os.kill(int(child), signal.SIGKILL)
            os.waitpid(int(child), 0)


def _options(attack: Attack, walls: Sequence[str]) -> JailOptions:
    isolation = "strict" if len(walls) == 2 else "best_effort"
    wall_factor = attack.wall_s / attack.cpu_s
    return JailOptions(isolation, attack.cpu_s, wall_factor, memory_mib=256, files_mib=attack.files_mib)


@lru_cache
def _jail(options: JailOptions, walls: Sequence[str]) -> Jail:
    """As on a machine that has `walls` alone."""
    real = capabilities()
    missing = {name: "" for name in ("landlock", "seccomp") if name not in walls}
    able = Capabilities(real.landlock * ("landlock" in walls), "seccomp" in walls, missing)
    with mock.patch("rltk.rollout.jail.run.capabilities", lambda: real if not missing else able):
        return Jail(options)


def _listener(family: int, kind: int, address: object) -> socket.socket:
    listening = socket.socket(family, kind)
    listening.bind(address)
    if kind == socket.SOCK_STREAM:
        listening.listen()
    return listening


def _has_key(table: Path) -> bool:
    return any(line.split()[0] == KEY for line in table.read_text().splitlines()[1:])


def _digest(folder: Path) -> str:
    """Names, rights, times and content of all below a folder."""
    found = hashlib.sha256()
    for path in sorted(folder.rglob("*")):
        facts = path.lstat()
        changed = facts.st_mtime_ns if path.is_file() else 0
        found.update(repr((str(path), facts.st_mode, facts.st_nlink, facts.st_size, changed)).encode())
        found.update(path.read_bytes() if path.is_file() else b"")
    return found.hexdigest()


def _children() -> list[str]:
    """Processes whose parent is this one, zombies too."""
    found = []
    for status in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = status.read_text().rpartition(")")[2].split()
        except OSError:
            continue
        if int(fields[1]) == os.getpid():
            found.append(status.parent.name)
    return found


if __name__ == "__main__":
    main()
