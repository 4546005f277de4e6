"""One learner rank as a Ray actor."""

from __future__ import annotations

import contextlib
import socket
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import ray

from rltk import watch
from rltk.learner.packing import RaggedBatch
from rltk.learner.settings import LearnerSettings, TrainResult
from rltk.trajectory import Version


@ray.remote(concurrency_groups={"watch": 1})
class LearnerRank:
    """All ranks are called alike, in the same order. `stacks` answers while a rank computes."""

    def __init__(self, settings: LearnerSettings, rank: int, ranks: int) -> None:
        self.settings, self.rank, self.ranks = settings, rank, ranks
        self.learner: Any = None

    def address(self) -> tuple[str, int]:
        """Where the ranks can meet: this node, a port that was free a moment ago."""
        with contextlib.closing(socket.socket()) as probe:
            probe.bind(("", 0))
            return ray.util.get_node_ip_address(), probe.getsockname()[1]

    def node(self) -> str:
        return ray.get_runtime_context().get_node_id()

    def start(self, host: str, port: int) -> None:
        from rltk.learner.learner import Learner

        self.learner = Learner(self.settings, self.rank, self.ranks, host, port)

    def train(self, batch: RaggedBatch, seed: int) -> TrainResult:
        return self.learner.train(batch, seed)

    def logprobs(self, batch: RaggedBatch) -> list[np.ndarray | None]:
        return self.learner.logprobs(batch)

    def score(self, sequences: Sequence[Sequence[int]]) -> list[np.ndarray]:
        return self.learner.score(sequences)

    def publish(self, path: str, version: Version) -> str:
        from rltk.learner import state

        return state.publish(self.learner, path, version)

    def discard(self, path: str) -> None:
        Path(path).unlink(missing_ok=True)

    def save(self, path: str) -> None:
        from rltk.learner import state

        state.save(self.learner, path)

    def load(self, path: str) -> None:
        from rltk.learner import state

        state.load(self.learner, path)

    def save_hugging_face(self, folder: str) -> None:
        from rltk.learner import state

        Path(folder).mkdir(parents=True, exist_ok=True)
        state.save_hugging_face(self.learner, folder)

    @ray.method(concurrency_group="watch")
    def stacks(self) -> str:
        return watch.stacks()
