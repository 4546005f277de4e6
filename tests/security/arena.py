"""Who runs attacks: this user, and where this one is root, an ordinary user as well. Several runners side by side."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
NOBODY = 65534
WALLS = ("landlock", "seccomp")
SIDE_BY_SIDE = 4  # many attacks wait rather than compute
DEADLINE_S = 280.0
# All that the jail needs of rltk: it runs from this alone, with no package installed.
PARTS = (
    "rltk/__init__.py", "rltk/errors.py", "rollout/__init__.py", "rollout/jail", "rollout/tools/__init__.py",
    "rollout/tools/options.py", "rollout/tools/types.py", "tests/__init__.py", "tests/security",
)  # fmt: skip


@dataclass(frozen=True)
class User:
    """`problem`: why nothing can run as this user here."""

    name: str
    uid: int
    python: str
    problem: str = ""


def users() -> list[User]:
    own = User("root" if os.getuid() == 0 else "ordinary user", os.getuid(), sys.executable)
    if own.uid != 0:
        return [User("root", 0, "", "these tests do not run as root"), own]
    for python in (sys.executable, shutil.which("python3", path="/usr/local/bin:/usr/bin:/bin")):
        if python and _runs(python):
            return [own, User("ordinary user", NOBODY, python)]
    return [own, User("ordinary user", NOBODY, "", "no Python from 3.11 on that an ordinary user may start")]


def _runs(python: str) -> bool:
    try:
        done = subprocess.run([python, "-c", "import sys, ctypes; assert sys.version_info >= (3, 11)"],
                              user=NOBODY, group=NOBODY, extra_groups=[], cwd="/", capture_output=True)  # fmt: skip
    except OSError:
        return False
    return done.returncode == 0


@contextmanager
def arena() -> Iterator[Path]:
    """A folder that all may enter, with the jail and these tests in `code`. Gone afterwards."""
    folder = Path(tempfile.mkdtemp(prefix="rltk-arena-"))
    try:
        folder.chmod(0o755)
        for part in PARTS:
            source, target = ROOT / part, folder / "code" / part.replace("rollout/", "rltk/rollout/")
            target.parent.mkdir(parents=True, exist_ok=True)
            copy = shutil.copytree if source.is_dir() else shutil.copy
            copy(source, target)
        for path in (folder / "code").rglob("*"):
            path.chmod(0o755 if path.is_dir() else 0o644)
        (folder / "code").chmod(0o755)
        yield folder
    finally:
        shutil.rmtree(folder)


def start(user: User, folder: Path, module: str, *arguments: str) -> subprocess.Popen[str]:
    """`python -m module` from the arena, as `user`, with a new empty folder as its first argument."""
    scratch = Path(tempfile.mkdtemp(dir=folder))
    if os.getuid() == 0:
        os.chown(scratch, user.uid, -1)
    scratch.chmod(0o755)
    changed = {} if user.uid == os.getuid() else {"user": user.uid, "group": user.uid, "extra_groups": []}
    environment = {"PATH": "/usr/bin:/bin", "PYTHONPATH": str(folder / "code"), "PYTHONDONTWRITEBYTECODE": "1"}
    return subprocess.Popen(
        [user.python, "-m", module, str(scratch), *arguments], text=True, cwd=scratch, env=environment,
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, **changed,
    )  # fmt: skip


def attacked(user: User, folder: Path, names: Sequence[str], walls: Sequence[str] = WALLS) -> dict[str, dict[str, Any]]:
    """What each attack came to, as on a machine that has `walls` alone. Raises RuntimeError where a runner, the parent
    of the attacks, did not come through."""

    def one(share: Sequence[str]) -> list[dict[str, Any]]:
        with start(user, folder, "tests.security.runner") as runner:
            try:
                out, err = runner.communicate(json.dumps([share, walls]), timeout=DEADLINE_S)
            except subprocess.TimeoutExpired:
                runner.kill()
                out, err = runner.communicate()
        lines = [json.loads(line) for line in out.splitlines()]
        if len(lines) < len(share):
            attack = share[len(lines)]
            raise RuntimeError(f"the parent did not survive {attack!r} (exit {runner.returncode}): {err[-2000:]}")
        return lines

    shares = [names[place::SIDE_BY_SIDE] for place in range(SIDE_BY_SIDE)]
    with ThreadPoolExecutor(SIDE_BY_SIDE) as pool:
        return {line["name"]: line for lines in pool.map(one, filter(None, shares)) for line in lines}
