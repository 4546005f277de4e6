"""Where a step's wall time goes. The shares sum to the whole: what nobody claims is `other`."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator

STAGES = ("generate", "reward", "logprobs", "train", "sync", "evaluate")


class TimeLedger:
    """Stages in seconds since the last `close`. Not re-entrant: a stage inside a stage would count twice."""

    def __init__(self) -> None:
        self._begun = time.perf_counter()
        self._stages = dict.fromkeys(STAGES, 0.0)
        self.total = dict.fromkeys((*STAGES, "other"), 0.0)

    def add(self, stage: str, seconds: float) -> None:
        self._stages[stage] += seconds

    @contextlib.contextmanager
    def stage(self, name: str) -> Iterator[None]:
        start = time.perf_counter()
        try:
            yield
        finally:
            self.add(name, time.perf_counter() - start)

    def close(self) -> dict[str, float]:
        """Ends the step: {"time/<stage>": seconds, ..., "time/other", "time/step"}; the first ones sum to the last.

        A step runs from the end of the one before, so a run's steps leave no gap (checkpoints fall under `other`).
        """
        now = time.perf_counter()
        wall, self._begun = now - self._begun, now
        parts = {**self._stages, "other": wall - sum(self._stages.values())}
        for name, seconds in parts.items():
            self.total[name] += seconds
        self._stages = dict.fromkeys(STAGES, 0.0)
        return {**{f"time/{name}": seconds for name, seconds in parts.items()}, "time/step": wall}
