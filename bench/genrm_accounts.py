"""What many questions to the judge service came to, and what of it must not be. Pure: no Ray, no clock.

One outcome a verdict that a client got. What a sound judge says is known of every question: where a first reply was
garbage, the verdict is the retry's, which is sampled otherwise, so that there are two right values.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

# Causes that the faults and the full queue may have. Any other one is a defect of the service or of the bench.
ALLOWED = ("queue_full", "timeout", "unavailable", "parse_fail")


@dataclass(frozen=True)
class Outcome:
    """What a client was told. `replies` that the judge read for it; `seconds` that the client waited."""

    uid: str
    value: float | None
    cause: str
    replies: int
    seconds: float


def percentile(seconds: Iterable[float], share: float) -> float:
    """The smallest that at least `share` of them do not pass; nan without any."""
    ordered = sorted(seconds)
    return ordered[max(0, math.ceil(share * len(ordered) - 1e-9) - 1)] if ordered else float("nan")


def tally(asked: Sequence[str], outcomes: Sequence[Outcome]) -> dict[str, Any]:
    """`lost`: uids asked and never answered for; `doubled`: answers beyond the first, or to what nobody asked."""
    answers = Counter(outcome.uid for outcome in outcomes)
    known = set(asked)
    waited = [outcome.seconds for outcome in outcomes if outcome.value is not None]
    return {
        "requests": len(asked),
        "lost": sum(not answers[uid] for uid in asked),
        "doubled": sum(count - 1 if uid in known else count for uid, count in answers.items()),
        "answered": len(waited),
        "unanswered": dict(Counter(outcome.cause for outcome in outcomes if outcome.value is None)),
        "after_a_retry": sum(outcome.replies > 1 for outcome in outcomes if outcome.value is not None),
        "p50_ms": 1000 * percentile(waited, 0.50),
        "p99_ms": 1000 * percentile(waited, 0.99),
    }


def wrong_values(outcomes: Sequence[Outcome], sound: Mapping[tuple[str, int], float | None]) -> list[str]:
    """Values that no sound judge gave: what failed, or was garbage, and became a reward. `sound`: by uid, replies."""
    said = [(outcome, sound[outcome.uid, outcome.replies]) for outcome in outcomes if outcome.value is not None]
    return [
        f"{outcome.uid}: the value is {outcome.value:g}, a sound judge's after {outcome.replies} replies {value}"
        for outcome, value in said
        if outcome.value != value
    ]


def service_faults(figures: Mapping[str, Any], stats: Mapping[str, Any], places: int, queue: int) -> list[str]:
    """What in the service's own counts does not add up or differs from its clients'. `stats`: GenRMService.stats."""
    router = stats["router"]
    ended = router["answered"] + router["cancelled"] + sum(router["failed"].values())
    pairs = {
        "asked": (stats["asked"], figures["requests"]),
        "answered": (stats["answered"], figures["answered"]),
        "causes": (stats["causes"], figures["unanswered"]),
        "cancelled": (stats["cancelled"], 0),
        "questions in flight": (stats["in_flight"], 0),
        "generations asked": (router["asked"], ended),
        "generations in flight": (router["in_flight"], 0),
        "waiting": (router["waiting"], 0),
        "load": (sum(replica["load"] for replica in router["replicas"]), 0),
    }
    found = [f"the service says {name} {ours}, it should be {theirs}" for name, (ours, theirs) in pairs.items()
             if ours != theirs]  # fmt: skip
    # Who has begun is never refused: those that held a place may come back to a full queue.
    if router["most_waiting"] > queue + places:
        found.append(f"{router['most_waiting']} waited at once: the bound is {queue}, and {places} places")
    return found


def violations(figures: Mapping[str, Any], wrong: Sequence[str], service: Sequence[str]) -> list[str]:
    """Everything that must not be; empty: the run is sound."""
    found = [f"{name}: {figures[name]}" for name in ("lost", "doubled") if figures[name]]
    found += [f"{count} verdicts with the cause {cause!r}" for cause, count in figures["unanswered"].items()
              if cause not in ALLOWED]  # fmt: skip
    return [*found, *wrong, *service]
