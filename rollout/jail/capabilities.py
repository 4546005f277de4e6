"""What this machine can confine code with. Asked of the kernel, not guessed from its version."""

from __future__ import annotations

import ctypes
import errno
import platform
from dataclasses import dataclass

from rltk.rollout.jail import landlock, seccomp

SECCOMP = {"x86_64": 317, "aarch64": 277}  # seccomp(2)
GET_ACTION_AVAIL = 2


@dataclass(frozen=True)
class Capabilities:
    """`landlock`: its ABI version, 0 where there is none. `missing`: name -> what to do, empty where all is there."""

    landlock: int
    seccomp: bool
    missing: dict[str, str]

    @property
    def level(self) -> str:
        """The isolation that is reached here: "strict", or "best_effort: without ..."."""
        return "strict" if not self.missing else f"best_effort: without {', '.join(self.missing)}"


def capabilities() -> Capabilities:
    version = landlock.abi()
    missing = {} if version else {"landlock": _no_landlock()}
    filters = _seccomp()
    if not filters:
        missing["seccomp"] = (
            f"no table of system calls for {platform.machine()}"
            if platform.machine() not in seccomp.MACHINES
            else "use a kernel built with CONFIG_SECCOMP_FILTER; in a container, one that allows seccomp(2)"
        )
    return Capabilities(version, filters, missing)


def _no_landlock() -> str:
    """The last call was landlock_create_ruleset; errno says why it failed."""
    if ctypes.get_errno() == errno.EOPNOTSUPP:
        return "add landlock to the kernel's lsm= boot parameter"
    return "use Linux 5.13 or later; in a container, a seccomp profile that allows the landlock_* calls"


def _seccomp() -> bool:
    machine = platform.machine()
    if machine not in seccomp.MACHINES:
        return False
    action = ctypes.c_uint32(seccomp.ERRNO)
    return landlock.libc.syscall(SECCOMP[machine], GET_ACTION_AVAIL, 0, ctypes.byref(action)) == 0
