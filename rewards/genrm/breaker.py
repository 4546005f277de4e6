"""A circuit breaker: a replica that fails again and again is left alone for a while, then tried with one question.

closed --failures in a row--> open --pause--> half_open --one trial--> closed
                               ^                            |
                               +------ pause doubled -------+
"""

from __future__ import annotations

import time
from collections.abc import Callable

LONGEST_S = 60.0  # between two trials


class Breaker:
    """`failures` in a row open it for `pause_s` seconds. Not thread-safe.

    Whoever is let in says how it ended: `success`, `failure` or `abandon` (nobody can tell), with what `begin` gave.
    """

    def __init__(self, failures: int, pause_s: float, clock: Callable[[], float] = time.monotonic) -> None:
        self._limit, self._first_pause_s, self._clock = failures, pause_s, clock
        self._failures = 0  # in a row, while closed
        self._until: float | None = None  # open until then; None: closed
        self._trial = False  # one is under way
        self.openings = 0  # in a row

    @property
    def pause_s(self) -> float:
        """Of the last opening."""
        return min(LONGEST_S, self._first_pause_s * 2 ** (max(self.openings, 1) - 1))

    @property
    def state(self) -> str:
        """closed | open | half_open"""
        if self._until is None:
            return "closed"
        return "open" if self._clock() < self._until else "half_open"

    def allows(self) -> bool:
        return self.state == "closed" or (self.state == "half_open" and not self._trial)

    def begin(self) -> bool:
        """One question goes in. True: it is the trial of a half-open breaker."""
        trial = self.state == "half_open"
        self._trial = self._trial or trial
        return trial

    def success(self, trial: bool) -> None:
        """Also of a question that went in before it opened: the replica works."""
        self._failures = self.openings = 0
        self._until = None
        self._trial = self._trial and not trial

    def failure(self, trial: bool) -> bool:
        """True: this one opened it. Late failures of an open breaker say nothing new."""
        self.abandon(trial)
        trial = trial and self._until is not None  # else an older question has closed it meanwhile
        if self._until is not None and not trial:
            return False
        self._failures += 1
        if self._failures < self._limit and not trial:
            return False
        self._failures = 0
        self.openings += 1
        self._until = self._clock() + self.pause_s
        return True

    def abandon(self, trial: bool) -> None:
        self._trial = self._trial and not trial
