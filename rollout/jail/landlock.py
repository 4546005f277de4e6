"""Landlock: which files jailed code may open. Linux 5.13 and later, for any user; landlock(7).

A rule set is made here, in the parent, and given to the child as a file descriptor: the child only enters it.
"""

from __future__ import annotations

import ctypes
import os
import stat
import struct
from collections.abc import Iterable
from pathlib import Path

CREATE_RULESET, ADD_RULE, RESTRICT_SELF = 444, 445, 446  # the same numbers on every architecture
WRITE_FILE, READ_FILE, READ_DIR, MAKE_REG, TRUNCATE = 1 << 1, 1 << 2, 1 << 3, 1 << 8, 1 << 14
OF_A_FILE = 1 | WRITE_FILE | READ_FILE | TRUNCATE | 1 << 15  # rights that a rule about a file (no folder) may have
TCP, SCOPES = 3, 3  # bind and connect; abstract Unix sockets and signals

libc = ctypes.CDLL(None, use_errno=True)


def abi() -> int:
    """Version of Landlock in the running kernel; 0 where there is none, or it is switched off."""
    return max(0, libc.syscall(CREATE_RULESET, None, ctypes.c_size_t(0), 1))


def ruleset(
    version: int, readable: Iterable[Path], listable: Iterable[Path] = (), writable: Iterable[Path] = ()
) -> int:
    """A file descriptor of rules: read files at or under `readable`, list folders under `listable`, and in the folders
    `writable` make, read and write files, but neither remove nor rename them nor make folders. Missing paths are left
    out. Everything else that this kernel's Landlock (`version`) can refuse is refused. Raises OSError.
    """
    handled = (1 << 13) - 1 | (1 << 13 if version >= 2 else 0) | (TRUNCATE if version >= 3 else 0)
    handled |= 1 << 15 if version >= 5 else 0  # ioctl on devices
    attributes = struct.pack("QQQ", handled, TCP if version >= 4 else 0, SCOPES if version >= 6 else 0)
    size = 24 if version >= 6 else 16 if version >= 4 else 8
    rules = _syscall(CREATE_RULESET, ctypes.c_char_p(attributes), ctypes.c_size_t(size), 0)
    try:
        for paths, rights in (
            (readable, READ_FILE | READ_DIR),
            (listable, READ_DIR),
            (writable, READ_FILE | READ_DIR | WRITE_FILE | MAKE_REG | TRUNCATE),
        ):
            for path in paths:
                _allow(rules, path, rights & handled)
    except BaseException:
        os.close(rules)
        raise
    return rules


def _allow(rules: int, path: Path, rights: int) -> None:
    try:
        opened = os.open(path, os.O_PATH | os.O_CLOEXEC)
    except OSError:
        return
    try:
        if not stat.S_ISDIR(os.fstat(opened).st_mode):
            rights &= OF_A_FILE
        if rights:
            _syscall(ADD_RULE, rules, 1, ctypes.c_char_p(struct.pack("=Qi", rights, opened)), 0)
    finally:
        os.close(opened)


def _syscall(number: int, *arguments: object) -> int:
    result = libc.syscall(number, *arguments)
    if result < 0:
        raise OSError(ctypes.get_errno(), f"Landlock (system call {number}): {os.strerror(ctypes.get_errno())}")
    return result
