"""The learner as the driver sees it: all ranks as one."""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import ray

from rltk import watch
from rltk.errors import DeadlineError, InfrastructureError
from rltk.learner.actor import LearnerRank
from rltk.learner.packing import RaggedBatch
from rltk.learner.settings import LearnerSettings, TrainResult
from rltk.trajectory import Version


class RankDiedError(InfrastructureError):
    """The process of a learner rank is gone. What it held goes with it: the whole group has to be started anew."""


class LearnerGroup:
    """Starts the ranks and calls them together; every wait has a deadline (seconds)."""

    def __init__(
        self, settings: LearnerSettings, ranks: int, cpus: float, gpus: float, deadline: float, start_deadline: float
    ) -> None:
        self.deadline = deadline
        placed = LearnerRank.options(num_cpus=cpus, num_gpus=gpus)
        self.ranks = [placed.remote(settings, rank, ranks) for rank in range(ranks)]
        self._start_deadline = start_deadline

    def placed(self) -> list[Any]:
        """References that resolve when every rank has its share of the cluster; nothing is loaded yet."""
        return [rank.stacks.remote() for rank in self.ranks]

    def start(self) -> list[Any]:
        """References that resolve when every rank stands (so that engines can start at the same time)."""
        host, port = watch.get(
            self.ranks[0].address.remote(), "find a port", "driver", "learner rank 0", self._start_deadline
        )
        return [rank.start.remote(host, port) for rank in self.ranks]

    def stand(self) -> None:
        """`start`, and wait until every rank stands."""
        with self._telling_deaths("start"):
            watch.get(self.start(), "start", "driver", "learner ranks", self._start_deadline, peek=self.ranks)

    def _all(self, method: str, *arguments: Any, poll: Any = None) -> list[Any]:
        with self._telling_deaths(method):
            references = [getattr(rank, method).remote(*arguments) for rank in self.ranks]
            return watch.get(references, method, "driver", "learner ranks", self.deadline, peek=self.ranks, poll=poll)

    @contextmanager
    def _telling_deaths(self, what: str) -> Iterator[None]:
        """RankDiedError in place of whatever a call raised, if a rank's process is gone: the first to be heard may be
        one that lost its peer in a collective."""
        try:
            yield
        except ray.exceptions.RayError as error:
            if not (dead := self._dead()):
                raise
            raise RankDiedError(f"learner rank {', '.join(map(str, dead))} died during {what!r}") from error

    def _dead(self) -> list[int]:
        """Numbers of the ranks whose process is gone. One that is too busy to answer is not."""
        return [number for number, rank in enumerate(self.ranks) if not _alive(rank)]

    def stop(self) -> None:
        """End every rank, at once."""
        for rank in self.ranks:
            ray.kill(rank)

    def train(self, batch: RaggedBatch, seed: int, poll: Any = None) -> TrainResult:
        """One training step on all ranks; arrays by sequence are put together from the ranks that ran them."""
        results = self._all("train", ray.put(batch), seed, poll=poll)
        merged = {name: _first_of([getattr(r, name) for r in results]) for name in ("old", "new", "entropy")}
        seconds = {key: max(r.seconds[key] for r in results) for key in results[0].seconds}
        return replace(results[0], seconds=seconds, **merged)

    def logprobs(self, batch: RaggedBatch) -> list[np.ndarray | None]:
        """float32 [n] of each sequence's sampled tokens at the current weights, at the run's temperature."""
        return _first_of(self._all("logprobs", ray.put(batch)))

    def score(self, sequences: Sequence[Sequence[int]]) -> list[np.ndarray]:
        return self._all("score", sequences)[0]

    def publish(self, path: str, version: Version) -> str:
        """Writes the weight file; returns its checksum."""
        return self._all("publish", path, version)[0]

    def node(self) -> str:
        """Ray's id of the node that rank 0 is on."""
        return self._all("node")[0]

    def discard(self, path: str) -> None:
        """Remove a weight file on rank 0's node."""
        watch.get(self.ranks[0].discard.remote(path), "discard", "driver", "learner rank 0", self.deadline)

    def save(self, path: str) -> None:
        self._all("save", path)

    def load(self, path: str) -> None:
        self._all("load", path)

    def write_model(self, final: Path) -> None:
        """The weights as a Hugging Face folder. At any instant it or `<final>.old` is whole."""
        partial, old = final.with_name(f"{final.name}.partial"), final.with_name(f"{final.name}.old")
        shutil.rmtree(partial, ignore_errors=True)
        self._all("save_hugging_face", str(partial))
        shutil.rmtree(old, ignore_errors=True)
        if final.exists():
            final.rename(old)
        partial.rename(final)
        shutil.rmtree(old, ignore_errors=True)


def _alive(rank: Any) -> bool:
    try:
        watch.get(rank.stacks.remote(), "sign of life", "driver", "learner rank", 30)
    except ray.exceptions.RayActorError:
        return False
    except DeadlineError:
        return True
    return True


def _first_of(columns: list[list[np.ndarray | None]]) -> list[np.ndarray | None]:
    return [next((value for value in values if value is not None), None) for values in zip(*columns, strict=True)]
