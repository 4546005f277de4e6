"""Weight transfer through host memory: the learner writes a file in /dev/shm, every engine maps it.

Serves engines and learner on one node, on CPU and on GPUs alike.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rltk import watch
from rltk.errors import WeightMismatchError
from rltk.learner.group import LearnerGroup
from rltk.sync.probe import ProbeResult, compare
from rltk.trajectory import Version

FOLDER = Path("/dev/shm")


@dataclass(frozen=True)
class Published:
    """What a sync proved: every engine holds `version`, whose bytes have `checksum`."""

    version: Version
    checksum: str
    probe: ProbeResult
    seconds: float


class SharedMemoryTransfer:
    """`publish(version)` moves the learner's weights to every engine and proves it.

    `run_id`, "<pid of the driver>-...", keeps runs apart and tells whose a file was.
    """

    def __init__(
        self,
        learner: LearnerGroup,
        engines: Sequence[Any],
        run_id: str,
        probe: Sequence[Sequence[int]],
        tolerance: tuple[float, float],
        deadline: float,
    ) -> None:
        self.learner, self.engines, self.run_id = learner, list(engines), run_id
        _remove_orphans()
        self.probe, self.tolerance, self.deadline = [list(ids) for ids in probe], tolerance, deadline

    def publish(self, version: Version) -> Published:
        """Returns when every engine has acknowledged version and checksum and has passed the probe.

        Raises WeightMismatchError, DeadlineError, or what the roles raised.
        """
        start = time.perf_counter()
        path = FOLDER / f"rltk-{self.run_id}-{version[0]}.{version[1]}.weights"
        try:
            checksum = self.learner.publish(str(path), version)
            answers = self._engines("load_weights", str(path), version)
        finally:
            path.unlink(missing_ok=True)
        for number, (got_version, got_checksum) in enumerate(answers):
            if (tuple(got_version), got_checksum) != (version, checksum):
                raise WeightMismatchError(
                    f"engine {number} acknowledged version {got_version} with checksum {got_checksum}; "
                    f"published were version {version} and checksum {checksum}"
                )
        expected = self.learner.score(self.probe)
        scored = self._engines("score", self.probe)
        results = [
            compare(found, expected, *self.tolerance, what=f"engine {number}, weights {version}")
            for number, found in enumerate(scored)
        ]
        worst = ProbeResult(max(r.largest for r in results), max(r.mean for r in results))
        return Published(version, checksum, worst, time.perf_counter() - start)

    def _engines(self, method: str, *arguments: Any) -> list[Any]:
        references = [getattr(engine, method).remote(*arguments) for engine in self.engines]
        return watch.get(references, method, "driver", "rollout engines", self.deadline, peek=self.engines)


def _remove_orphans() -> None:
    """A run that was killed inside a sync leaves its file behind, and it holds memory."""
    for path in FOLDER.glob("rltk-*.weights*"):
        pid = path.name.split("-")[1]
        if pid.isdigit() and not Path("/proc", pid).exists():
            with contextlib.suppress(OSError):  # gone already, or another user's
                path.unlink()
