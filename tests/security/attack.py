"""What an attack is, and the list of all: the files in sources/, and the sources too large for a file.

A file holds a group: what it is about, `ends`, and the attacks, each under `=== name | option=value ...`.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

SECRET = "TOPSECRET-4242"  # in the parent's environment, in files, in a gold answer: must never be in a result
# Before every attack's source. It is told everything that would help it. `escaped` marks a success.
PRELUDE = """\
import ctypes, errno, os
PARENT, OUTSIDE, HOME, TCP, UDP = {parent}, {outside!r}, {home!r}, {tcp}, {udp}
_libc = ctypes.CDLL(None, use_errno=True)
def escaped(*what): print("ESCAPED", *what, flush=True)
def call(number, *arguments):
    done = _libc.syscall(number, *[ctypes.c_long(a) if isinstance(a, int) else a for a in arguments])
    if done >= 0 or ctypes.get_errno() not in (errno.EPERM, errno.EACCES, errno.ENOSYS):
        escaped("system call", number, done, ctypes.get_errno())
def attempt(action, *arguments):
    try: got = action(*arguments)
    except OSError: return
    escaped(getattr(action, "__name__", action), *arguments[:2], got)
"""
SOURCES = Path(__file__).with_name("sources")
# name -> source, and its ends. What CPython makes of them differs; that it comes back in time is what counts.
LARGE = {
    "10 MB of lines": ("x = 1\n" * 1_700_000, "ok error oom timeout killed"),
    "10 MB in one string": (f"x = '{'a' * 10_000_000}'\nprint(len(x))", "ok"),
    "10 MB in one expression": ("+".join(["1"] * 5_000_000), "error oom timeout killed"),
    "deep nesting, brackets": ("(" * 100_000, "error"),
    "deep nesting, signs": ("-" * 1_000_000 + "1", "error killed"),
    "deep nesting, blocks": ("".join(" " * n + "if 1:\n" for n in range(1000)), "error"),
    "deep nesting, attributes": ("a" + ".b" * 500_000, "error killed"),
    "a constant to fold": ("x = ((1 << 4000) ** 4000) ** 4000", "error oom timeout killed"),
    "NUL": ("print(1)\0print(2)", "error"),
    "lone surrogates": ("print('\ud800')", "ok error"),
    "another encoding": ("# coding: rot13\nprint(1)", "ok error"),
    "nothing": ("", "ok"),
}


@dataclass(frozen=True)
class Attack:
    """`ends`: the ways in which a call may end that mean it was held. Numbers are the jail's options for it."""

    name: str
    group: str
    source: str
    ends: tuple[str, ...]
    cpu_s: float = 4.0
    wall_s: float = 30.0
    files_mib: int = 0
    bare: bool = False  # without the prelude

    @property
    def key(self) -> str:
        return f"{self.group}: {self.name}"


def _read(file: Path) -> Iterator[Attack]:
    head, *parts = file.read_text().split("\n=== ")
    group = file.stem.replace("_", " ")
    default = head.splitlines()[1].removeprefix("ends: ").split()
    for part in parts:
        title, _, source = part.partition("\n")
        name, _, options = title.partition(" | ")
        told = dict(option.split("=") for option in options.split())
        ends = tuple(told.pop("ends").split(",")) if "ends" in told else tuple(default)
        files_mib = int(told.pop("files_mib", "0"))
        yield Attack(name, group, source, ends, files_mib=files_mib, **{key: float(told[key]) for key in told})


def _all() -> Iterator[Attack]:
    for file in sorted(SOURCES.glob("*.txt")):
        yield from _read(file)
    for name, (source, ends) in LARGE.items():
        yield Attack(name, "source", source, tuple(ends.split()), cpu_s=1.0, bare=True)


ATTACKS: dict[str, Attack] = {attack.key: attack for attack in _all()}
