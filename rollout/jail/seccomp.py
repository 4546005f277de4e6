"""The seccomp filter of jailed code: a list of the system calls that computing needs. Everything else is refused.

Refused calls answer EPERM, so that Python raises PermissionError and goes on; a call through another ABI (x32, i386)
ends the process. No entry names another process: no fork, exec, kill, ptrace, socket, mount, bpf, io_uring, memfd,
SysV IPC, keys, and no prctl that would undo what the jail has set up. Filters compare numbers, not what pointers point
to: which *paths* may be opened is Landlock's part.

Numbers: the kernel's syscall tables; layout of the program: linux/seccomp.h, linux/bpf_common.h.
"""

from __future__ import annotations

import errno
import platform
import struct
from dataclasses import dataclass

ALLOW, KILL, ERRNO = 0x7FFF0000, 0x80000000, 0x00050000
LOAD, EQUAL, AT_LEAST, ANY_BIT, RETURN = 0x20, 0x15, 0x35, 0x45, 0x06
NUMBER, ARCHITECTURE, ARGUMENTS = 0, 4, 16  # offsets in struct seccomp_data
X32 = 0x40000000  # bit of the x86-64 numbers of another ABI, whose calls a list of numbers would miss

# A thread, in no namespace of its own (fork is a clone without CLONE_THREAD).
CLONE_THREAD, CLONE_NAMESPACES = 0x00010000, 0x7E020000
O_TMPFILE = 0x400000  # a file that no listing of the folder would show: it would escape the quota
O_WRITES = 0x1 | 0x2 | 0x40 | 0x200  # O_WRONLY, O_RDWR, O_CREAT, O_TRUNC
IOCTLS = (0x5401, 0x5413, 0x541B, 0x5421, 0x5450, 0x5451)  # TCGETS (isatty), TIOCGWINSZ, FIONREAD, FIONBIO, FIO*CLEX
# No F_SETOWN, F_SETSIG: the kernel would signal another process for us. No leases, no pipe sizes, no seals.
FCNTLS = (0, 1, 2, 3, 4, 5, 1030)  # F_DUPFD, F_GETFD, F_SETFD, F_GETFL, F_SETFL, F_GETLK, F_DUPFD_CLOEXEC
PRCTLS = (15, 16, 0x53564D41)  # PR_SET_NAME, PR_GET_NAME, PR_SET_VMA; above all not PR_SET_PDEATHSIG


@dataclass(frozen=True)
class Machine:
    audit: int  # AUDIT_ARCH_*
    plain: tuple[int, ...]  # calls allowed whatever their arguments
    clone: int
    clone3: int
    prctl: int
    ioctl: int
    fcntl: int
    prlimit64: int
    opens: tuple[tuple[int, int], ...]  # (call, position of its flags)


# In the order of the comment lines: memory; files; waiting and time; signals to itself; threads; who and where am I.
X86_64 = Machine(
    audit=0xC000003E,
    plain=(
        9, 10, 11, 12, 25, 26, 28,
        0, 1, 3, 4, 5, 6, 8, 17, 18, 19, 20, 21, 22, 32, 33, 74, 75, 77, 79, 89, 217, 262, 267, 269, 292, 293, 332, 439,
        7, 23, 34, 35, 36, 37, 38, 96, 201, 219, 228, 229, 230, 270, 271,
        13, 14, 15, 127, 128, 130, 131,
        24, 60, 186, 202, 204, 218, 231, 273, 309, 334,
        39, 63, 97, 98, 99, 100, 102, 104, 107, 108, 110, 111, 115, 118, 120, 318,
    ),
    clone=56, clone3=435, prctl=157, ioctl=16, fcntl=72, prlimit64=302, opens=((2, 1), (257, 2)),
)  # fmt: skip
AARCH64 = Machine(
    audit=0xC00000B7,
    plain=(
        214, 215, 216, 222, 226, 227, 233,
        63, 64, 57, 79, 80, 62, 67, 68, 65, 66, 48, 59, 23, 24, 82, 83, 46, 17, 78, 61, 291, 439,
        72, 73, 101, 102, 103, 113, 114, 115, 128, 169,
        134, 135, 139, 136, 137, 133, 132,
        124, 93, 178, 98, 123, 96, 94, 99, 168, 293,
        172, 160, 163, 165, 179, 153, 174, 176, 175, 177, 173, 158, 148, 150, 278,
    ),
    clone=220, clone3=435, prctl=167, ioctl=29, fcntl=25, prlimit64=261, opens=((56, 2),),
)  # fmt: skip
MACHINES = {"x86_64": X86_64, "aarch64": AARCH64}


def program(writes: bool, machine: Machine | None = None) -> bytes:
    """The filter as an array of struct sock_filter. `writes`: files may be opened for writing where Landlock lets them.

    Raises KeyError on a machine that has no table here.
    """
    machine = machine or MACHINES[platform.machine()]
    refuse = _return(ERRNO | errno.EPERM)
    code = [
        _step(LOAD, ARCHITECTURE), _step(EQUAL, machine.audit, 1, 0), _return(KILL),
        _step(LOAD, NUMBER), _step(AT_LEAST, X32, 0, 1), _return(KILL),
        *_call(machine.clone3, [_return(ERRNO | errno.ENOSYS)]),  # its flags lie in memory; glibc falls back to clone
    ]  # fmt: skip
    for number in machine.plain:
        code += _call(number, [_return(ALLOW)])
    by_option = ((machine.ioctl, 1, IOCTLS), (machine.fcntl, 1, FCNTLS), (machine.prctl, 0, PRCTLS))
    for number, position, values in by_option:
        code += _call(number, [_low(position), *_one_of(values)])
    forbidden = O_TMPFILE if writes else O_TMPFILE | O_WRITES
    for number, position in machine.opens:
        refused = _return(ERRNO | errno.EACCES)
        code += _call(number, [_low(position), _step(ANY_BIT, forbidden, 0, 1), refused, _return(ALLOW)])
    a_thread = [_step(ANY_BIT, CLONE_NAMESPACES, 2, 0), _step(ANY_BIT, CLONE_THREAD, 0, 1), _return(ALLOW), refuse]
    code += _call(machine.clone, [_low(0), *a_thread])
    # Its own limits may be read, none set, and none of another process: same user, same right to set them.
    nothing = [step for load in (_low(0), _low(2), _high(2)) for step in (load, _step(EQUAL, 0, 1, 0), refuse)]
    code += _call(machine.prlimit64, [*nothing, _return(ALLOW)])
    return b"".join([*code, refuse])


def _step(code: int, value: int, then: int = 0, otherwise: int = 0) -> bytes:
    """One instruction; the last two say how many to skip after a comparison."""
    return struct.pack("HBBI", code, then, otherwise, value)


def _return(action: int) -> bytes:
    return _step(RETURN, action)


def _low(position: int) -> bytes:
    return _step(LOAD, ARGUMENTS + 8 * position)


def _high(position: int) -> bytes:
    return _step(LOAD, ARGUMENTS + 8 * position + 4)


def _call(number: int, body: list[bytes]) -> list[bytes]:
    """`body` for this call, which returns on every path; the next instruction for all others."""
    return [_step(EQUAL, number, 0, len(body)), *body]


def _one_of(values: tuple[int, ...]) -> list[bytes]:
    checks = [_step(EQUAL, value, len(values) - place, 0) for place, value in enumerate(values)]
    return [*checks, _return(ERRNO | errno.EPERM), _return(ALLOW)]
