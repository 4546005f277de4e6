"""The learner as the driver sees it: all ranks as one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import ray

from rltk import watch
from rltk.learner.actor import LearnerRank
from rltk.learner.packing import RaggedBatch
from rltk.learner.settings import LearnerSettings, TrainResult
from rltk.trajectory import Version


class LearnerGroup:
    """Starts the ranks and calls them together; every wait has a deadline (seconds)."""

    def __init__(
        self, settings: LearnerSettings, ranks: int, cpus: float, gpus: float, deadline: float, start_deadline: float
    ) -> None:
        self.deadline = deadline
        placed = LearnerRank.options(num_cpus=cpus, num_gpus=gpus)
        self.ranks = [placed.remote(settings, rank, ranks) for rank in range(ranks)]
        self._start_deadline = start_deadline

    def start(self) -> list[Any]:
        """References that resolve when every rank stands (so that engines can start at the same time)."""
        host, port = watch.get(
            self.ranks[0].address.remote(), "find a port", "driver", "learner rank 0", self._start_deadline
        )
        return [rank.start.remote(host, port) for rank in self.ranks]

    def _all(self, method: str, *arguments: Any, poll: Any = None) -> list[Any]:
        references = [getattr(rank, method).remote(*arguments) for rank in self.ranks]
        return watch.get(references, method, "driver", "learner ranks", self.deadline, peek=self.ranks, poll=poll)

    def train(self, batch: RaggedBatch, seed: int, poll: Any = None) -> TrainResult:
        """One training step on all ranks; arrays by sequence are put together from the ranks that ran them."""
        results = self._all("train", ray.put(batch), seed, poll=poll)
        merged = {name: _first_of([getattr(r, name) for r in results]) for name in ("old", "new", "entropy")}
        seconds = {key: max(r.seconds[key] for r in results) for key in results[0].seconds}
        return replace(results[0], seconds=seconds, **merged)

    def score(self, sequences: Sequence[Sequence[int]]) -> list[np.ndarray]:
        return self._all("score", sequences)[0]

    def publish(self, path: str, version: Version) -> str:
        """Writes the weight file; returns its checksum."""
        return self._all("publish", path, version)[0]

    def save(self, path: str) -> None:
        self._all("save", path)

    def load(self, path: str) -> None:
        self._all("load", path)

    def save_hugging_face(self, folder: str) -> None:
        self._all("save_hugging_face", folder)


def _first_of(columns: list[list[np.ndarray | None]]) -> list[np.ndarray | None]:
    return [next((value for value in values if value is not None), None) for values in zip(*columns, strict=True)]
