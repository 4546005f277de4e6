"""The filter, run by an interpreter of its instructions written here: what it answers to each system call."""

from __future__ import annotations

import errno
import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rltk.rollout.jail.seccomp import AARCH64, ALLOW, ERRNO, KILL, X86_64, Machine, program

BOTH = pytest.mark.parametrize("machine", [X86_64, AARCH64], ids=["x86_64", "aarch64"])
WORD = st.integers(0, 2**64 - 1)


def answer(code: bytes, audit: int, number: int, *arguments: int) -> int:
    """Classic BPF (man 2 bpf, linux/filter.h): load, compare, jump forward, return."""
    data = struct.pack("<IIQ6Q", number, audit, 0, *arguments, *[0] * (6 - len(arguments)))
    steps = list(struct.iter_unpack("<HBBI", code))
    place = value = 0
    while True:
        kind, then, otherwise, constant = steps[place]
        place += 1
        if kind == 0x06:
            return constant
        if kind == 0x20:
            (value,) = struct.unpack_from("<I", data, constant)
            continue
        holds = {0x15: value == constant, 0x35: value >= constant, 0x45: bool(value & constant)}[kind]
        place += then if holds else otherwise


def refused(result: int) -> bool:
    return result == KILL or result & 0xFFFF0000 == ERRNO


@BOTH
@given(number=st.integers(0, 2**32 - 1), arguments=st.tuples(*[WORD] * 6), writes=st.booleans())
def test_every_call_is_allowed_refused_or_deadly(machine: Machine, number: int, arguments: tuple, writes: bool):
    result = answer(program(writes, machine), machine.audit, number, *arguments)
    assert result == ALLOW or refused(result)
    asked = {machine.clone, machine.ioctl, machine.fcntl, machine.prctl, machine.prlimit64}
    known = {*machine.plain, *asked, *(call for call, _ in machine.opens)}
    assert result != ALLOW or number in known


# Numbers from the kernel's tables (arch/x86/entry/syscalls/syscall_64.tbl, include/uapi/asm-generic/unistd.h).
@pytest.mark.parametrize("machine, numbers", [
    (X86_64, {"socket": 41, "connect": 42, "socketpair": 53, "fork": 57, "vfork": 58, "execve": 59, "kill": 62,
              "chdir": 80, "rename": 82, "mkdir": 83, "creat": 85, "link": 86, "unlink": 87, "symlink": 88,
              "chmod": 90, "chown": 92, "ptrace": 101, "setuid": 105, "truncate": 76, "chroot": 161, "mount": 165,
              "tkill": 200, "unshare": 272, "splice": 275, "setns": 308, "process_vm_readv": 310, "bpf": 321,
              "execveat": 322, "memfd_create": 319, "seccomp": 317, "io_uring_setup": 425, "pidfd_open": 434,
              "openat2": 437, "landlock_restrict_self": 446, "shmget": 29, "setrlimit": 160, "keyctl": 250}),
    (AARCH64, {"socket": 198, "connect": 203, "socketpair": 199, "execve": 221, "kill": 129, "chdir": 49,
               "renameat2": 276, "mkdirat": 34, "linkat": 37, "unlinkat": 35, "symlinkat": 36, "fchmodat": 53,
               "fchownat": 54, "ptrace": 117, "setuid": 146, "truncate": 45, "chroot": 51, "mount": 40, "tkill": 130,
               "unshare": 97, "splice": 76, "setns": 268, "process_vm_readv": 270, "bpf": 280, "execveat": 281,
               "memfd_create": 279, "seccomp": 277, "io_uring_setup": 425, "pidfd_open": 434, "openat2": 437,
               "landlock_restrict_self": 446, "shmget": 194, "setrlimit": 164, "keyctl": 219, "tgkill": 131}),
], ids=["x86_64", "aarch64"])  # fmt: skip
def test_calls_that_reach_out_are_refused(machine: Machine, numbers: dict[str, int]):
    results = {name: answer(program(True, machine), machine.audit, number) for name, number in numbers.items()}
    assert results == dict.fromkeys(numbers, ERRNO | errno.EPERM)


@BOTH
def test_another_abi_is_deadly(machine: Machine):
    other = AARCH64 if machine is X86_64 else X86_64
    code = program(True, machine)
    assert answer(code, other.audit, machine.plain[0]) == KILL
    assert answer(code, 0x40000003, 1) == KILL  # i386
    assert answer(code, machine.audit, 0x40000000 | 1) == KILL  # x32


@BOTH
@given(flags=WORD)
def test_clone_makes_threads_only(machine: Machine, flags: int):
    thread, namespaces = 0x00010000, 0x02000000 | 0x00020000 | 0x7C000000
    allowed = answer(program(True, machine), machine.audit, machine.clone, flags) == ALLOW
    assert allowed == bool(flags & thread and not flags & namespaces)


@BOTH
def test_clone3_does_not_exist(machine: Machine):
    assert answer(program(True, machine), machine.audit, machine.clone3) == ERRNO | errno.ENOSYS


@BOTH
@given(flags=st.integers(0, 2**23 - 1), writes=st.booleans())
def test_opening(machine: Machine, flags: int, writes: bool):
    makes, unnamed = flags & (0o1 | 0o2 | 0o100 | 0o1000), flags & 0o20000000
    for number, position in machine.opens:
        result = answer(program(writes, machine), machine.audit, number, *[0] * position, flags)
        assert result == (ERRNO | errno.EACCES if unnamed or (makes and not writes) else ALLOW)


@BOTH
@given(pid=WORD, new=WORD)
def test_only_own_limits_are_read(machine: Machine, pid: int, new: int):
    def limits(pid: int, new: int) -> int:
        return answer(program(True, machine), machine.audit, machine.prlimit64, pid, 9, new, 1)

    assert limits(0, 0) == ALLOW
    assert (limits(pid, new) == ALLOW) == (pid % 2**32 == 0 and new == 0)  # the kernel takes 32 bits of a pid


@BOTH
def test_no_signal_by_detours_and_no_protection_undone(machine: Machine):
    code = program(True, machine)
    for command in (8, 10, 15, 1024, 1031, 1033):  # F_SETOWN, F_SETSIG, F_SETOWN_EX, leases, pipe sizes, seals
        assert refused(answer(code, machine.audit, machine.fcntl, 0, command))
    for command in (0x8901, 0x5452, 0x5412):  # FIOSETOWN, FIOASYNC, TIOCSTI
        assert refused(answer(code, machine.audit, machine.ioctl, 0, command))
    for option in (1, 4, 8, 22, 36, 38, 0x59616D61):  # PDEATHSIG, DUMPABLE, KEEPCAPS, SECCOMP, SUBREAPER, ...
        assert refused(answer(code, machine.audit, machine.prctl, option))
    assert answer(code, machine.audit, machine.fcntl, 0, 1) == ALLOW
    assert answer(code, machine.audit, machine.ioctl, 0, 0x5401) == ALLOW
    assert answer(code, machine.audit, machine.prctl, 15) == ALLOW
