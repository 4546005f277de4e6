"""Folders for calls that may write files: one each, in a folder of the jail's, and none left behind.

A process that is killed cannot remove its folder. So each holds a lock on its own, and the next one removes those that
nobody holds.
"""

from __future__ import annotations

import fcntl
import os
import shutil
import tempfile
import time
import weakref
from pathlib import Path

PREFIX = "rltk-jail-"
YOUNG_S = 60.0  # a younger folder may be about to be locked


class Folders:
    def __init__(self):
        self.root = Path(tempfile.mkdtemp(prefix=PREFIX))
        lock = os.open(self.root, os.O_RDONLY)
        fcntl.flock(lock, fcntl.LOCK_EX)
        weakref.finalize(self, _end, self.root, lock)
        for folder in self.root.parent.glob(f"{PREFIX}*"):
            if folder != self.root:
                _remove_abandoned(folder)

    def make(self) -> Path:
        return Path(tempfile.mkdtemp(dir=self.root))


def _end(root: Path, lock: int) -> None:
    shutil.rmtree(root, ignore_errors=True)
    os.close(lock)


def _remove_abandoned(folder: Path) -> None:
    """Unless it is somebody else's, held, or young."""
    try:
        facts = folder.lstat()
        if facts.st_uid != os.getuid() or time.time() - facts.st_mtime < YOUNG_S:
            return
        opened = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    except OSError:
        return
    try:
        fcntl.flock(opened, fcntl.LOCK_EX | fcntl.LOCK_NB)
        shutil.rmtree(folder, ignore_errors=True)
    except BlockingIOError:
        pass
    finally:
        os.close(opened)
