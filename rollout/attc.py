"""ATTC, adaptive tool trust calibration (arXiv 2604.08281): whoever was sure of the call is led to trust its result.

Without training. The confidence of a call is the geometric mean of its tokens' probabilities, of the tokens that were
sampled and with the fences, as the authors' released code has it (their text says: of the likeliest tokens). From
`threshold` on, the result is followed by a sentence that believes it, below by one that reconsiders; a time-out has its
own. The result stands in every case. Ours: a failed call is always reconsidered (`reconsider_errors`), a call whose
tokens cannot be told apart gets no sentence and is counted, and of several calls in a turn the least sure one decides.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from rltk.rollout.interventions import CallSpan, Question, TurnView
from rltk.rollout.tools.options import AttcOptions
from rltk.rollout.tools.types import ToolResult

# In the first person: the model reads them as its own thought and goes on from there. A result ends in a line break.
TRUST = "I am sure of this code, so I believe its result and answer with it.\n"
RECONSIDER = "I am not sure of this code. I should reconsider it, or the way I am going, before I use its result.\n"
TIMED_OUT = "The code did not finish in time. I should find a faster way, or go on without running code.\n"
NOT_RUN = ("parse_error", "unknown_tool")  # nothing came back that could be believed


def confidence(logprobs: np.ndarray | None) -> float | None:
    """Geometric mean of probabilities, in [0, 1]; `logprobs` [n]. None where there is nothing to take it of."""
    if logprobs is None or len(logprobs) == 0:
        return None
    return min(1.0, float(np.exp(np.mean(logprobs, dtype=np.float64))))  # float32 log-probs may be a hair above 0


@dataclass
class Attc:
    """Counts turns by what they were met with; `confidences` and `unscorable` count calls."""

    options: AttcOptions
    confidences: list[float] = field(default_factory=list)
    unscorable: int = 0
    met: dict[str, int] = field(default_factory=lambda: {"trusted": 0, "reconsidered": 0, "timed_out": 0, "silent": 0})

    @property
    def stops(self) -> tuple[str, ...]:
        return ()

    def after_tools(self, calls: Sequence[tuple[CallSpan, ToolResult]]) -> str | None:
        values = [confidence(span.logprobs) for span, _ in calls]
        self.confidences += [value for value in values if value is not None]
        self.unscorable += values.count(None)
        verdict, sentence = self._verdict([result.status for _, result in calls], values)
        self.met[verdict] += 1
        return sentence

    def _verdict(self, statuses: Sequence[str], values: Sequence[float | None]) -> tuple[str, str | None]:
        if "timeout" in statuses:
            return "timed_out", TIMED_OUT
        if any(status in NOT_RUN or (status != "ok" and self.options.reconsider_errors) for status in statuses):
            return "reconsidered", RECONSIDER
        scored = [value for value in values if value is not None]
        if len(scored) < len(values):
            return "silent", None
        return ("trusted", TRUST) if min(scored) >= self.options.threshold else ("reconsidered", RECONSIDER)

    def at_stop(self, view: TurnView) -> Question | None:
        return None

    def answered(self, reply: str) -> str | None:
        return None

    def notes(self) -> dict[str, Any]:
        return {"attc": {"confidence": list(self.confidences), "unscorable": self.unscorable, **self.met}}
