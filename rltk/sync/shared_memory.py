"""Weights through host memory: the learner writes a file in /dev/shm, every engine maps it.

Serves engines and learner on one node, on CPU and on GPUs alike; the driver may be elsewhere.
"""

from __future__ import annotations

import contextlib
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray

from rltk import watch
from rltk.cluster import node_of, require_one_node
from rltk.config import Config
from rltk.errors import RltkError, WeightMismatchError
from rltk.learner.group import LearnerGroup
from rltk.roles import Roles
from rltk.sync.probe import LENGTH, TEXTS, TOLERANCE, ProbeResult, compare
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

    `roles` holds whoever is the learner and the engines at the time. `run_id`, "<pid of the driver>-...", keeps runs
    apart and tells whose a file was. ConfigError if learner rank 0 and an engine are on different nodes.
    """

    def __init__(self, config: Config, roles: Roles, run_id: str) -> None:
        self.roles, self.run_id, self.deadline = roles, run_id, config.deadlines.sync
        _remove_orphans()
        texts = watch.get(roles.workers[0].encode.remote(TEXTS), "encode the probe", "driver", "rollout worker", 60)
        room = config.task.max_prompt_tokens + config.task.max_response_tokens
        self.probe, self.tolerance = [ids[: min(LENGTH, room)] for ids in texts], _tolerance(config)
        self._checked: list[Any] = []  # actors that are known to be on one node
        self._elsewhere = False  # the driver is on another one
        self._check_nodes()

    def publish(self, version: Version) -> Published:
        """Returns when every engine has acknowledged version and checksum and has passed the probe.

        Raises WeightMismatchError, DeadlineError, RankDiedError, or what the roles raised.
        """
        start = time.perf_counter()
        self._check_nodes()
        learner = self._learner
        path = FOLDER / f"rltk-{self.run_id}-{version[0]}.{version[1]}.weights"
        try:
            checksum = learner.publish(str(path), version)
            answers = self._engines("load_weights", str(path), version)
        finally:
            self._discard(path)
        for number, (got_version, got_checksum) in enumerate(answers):
            if (tuple(got_version), got_checksum) != (version, checksum):
                raise WeightMismatchError(
                    f"engine {number} acknowledged version {got_version} with checksum {got_checksum}; "
                    f"published were version {version} and checksum {checksum}"
                )
        expected = learner.score(self.probe)
        scored = self._engines("score", self.probe)
        results = [
            compare(found, expected, *self.tolerance, what=f"engine {number}, weights {version}")
            for number, found in enumerate(scored)
        ]
        worst = ProbeResult(max(r.largest for r in results), max(r.mean for r in results))
        return Published(version, checksum, worst, time.perf_counter() - start)

    def _engines(self, method: str, *arguments: Any) -> list[Any]:
        engines = self.roles.engines
        references = [getattr(engine, method).remote(*arguments) for engine in engines]
        return watch.get(references, method, "driver", "rollout engines", self.deadline, peek=engines)

    @property
    def _learner(self) -> LearnerGroup:
        assert self.roles.learner is not None
        return self.roles.learner

    def _check_nodes(self) -> None:
        """A file in /dev/shm is seen on its own node alone. Asked again when an actor was replaced."""
        actors = [self._learner.ranks[0], *self.roles.engines]
        if actors == self._checked:
            return
        home = self._learner.node()
        require_one_node(home, {f"rollout engine {n}": node_of(e) for n, e in enumerate(self.roles.engines)})
        self._checked, self._elsewhere = actors, home != ray.get_runtime_context().get_node_id()

    def _discard(self, path: Path) -> None:
        path.unlink(missing_ok=True)
        if self._elsewhere:
            with contextlib.suppress(ray.exceptions.RayError, RltkError):  # a dead rank is heard of at the next call
                self._learner.discard(str(path))


def _tolerance(config: Config) -> tuple[float, float]:
    """Of the probe. The looser of the two sides' precisions counts."""
    loose = "bfloat16" if "bfloat16" in (config.rollout.dtype, config.learner.dtype) else "float32"
    largest, mean = TOLERANCE[loose]
    return config.sync.probe_max or largest, config.sync.probe_mean or mean


def _remove_orphans() -> None:
    """A run that was killed inside a sync leaves its file behind, and it holds memory."""
    for path in FOLDER.glob("rltk-*.weights*"):
        pid = path.name.split("-")[1]
        if pid.isdigit() and not Path("/proc", pid).exists():
            with contextlib.suppress(OSError):  # gone already, or another user's
                path.unlink()
