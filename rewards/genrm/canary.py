"""Canaries: a fixed set of solutions with known labels, asked again and again.

The judge's weights never change, so that a verdict which does means that something else has: the model behind a URL,
a replica that came back wrong, a template.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rltk.errors import ConfigError
from rltk.rewards.genrm.types import Question, Verdict

SHIPPED = Path(__file__).parent / "examples" / "canary.jsonl"
TOLERANCE = 0.1  # of a value: batches of other sizes round otherwise
UNREADABLE = "parse_fail"  # the model's own doing, unlike every other cause; it counts as a verdict here


@dataclass(frozen=True)
class Canary:
    question: Question
    flawed: bool


@dataclass(frozen=True)
class CanaryReport:
    """Shares in [0, 1]; None: nothing to compare.

    drift: of the answers to questions that were answered before, those that differ from the first; `replicas`: the same
    by replica. accuracy: of answers that say flawed or not, the right ones. unanswered: of all asked, without verdict.
    """

    drift: float | None
    accuracy: float | None
    unanswered: float
    replicas: dict[str, float | None]


def load_canaries(path: str | None) -> list[Canary]:
    """Raises ConfigError for a file that cannot be read, is empty, or whose lines are not such questions."""
    source = Path(path) if path else SHIPPED
    try:
        lines = [line for line in source.read_text().splitlines() if line.strip()]
        found = [_canary(number, json.loads(line)) for number, line in enumerate(lines)]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConfigError(
            f"canaries cannot be read from {source}: {error!r}; each line is "
            '{"problem": text, "response": text, "reference": text or null, "flawed": true or false}'
        ) from error
    if not found:
        raise ConfigError(f"{source} (reward.genrm.canary_file) holds no canaries")
    return found


def _canary(number: int, row: Any) -> Canary:
    problem, response, reference, flawed = row["problem"], row["response"], row.get("reference"), row["flawed"]
    texts = isinstance(problem, str) and isinstance(response, str) and isinstance(reference, str | None)
    if not (texts and isinstance(flawed, bool)):
        raise TypeError(f"line {number + 1} holds something of another type")
    return Canary(Question(f"canary-{number}", problem, response, reference), flawed)


class CanaryWatch:
    """What the canaries' first verdicts were. A replica is held against the first that answered, be it another."""

    def __init__(self, canaries: Sequence[Canary]) -> None:
        self.canaries = list(canaries)
        self._first: dict[str, Verdict] = {}

    def compare(self, answers: Mapping[str, Sequence[Verdict]]) -> CanaryReport:
        """answers: by replica, one verdict for each canary, in order."""
        changed: dict[str, list[bool]] = {name: [] for name in answers}
        right: list[bool] = []
        asked = unanswered = 0
        for name, verdicts in answers.items():
            for canary, verdict in zip(self.canaries, verdicts, strict=True):
                asked += 1
                if verdict.value is None and verdict.cause != UNREADABLE:
                    unanswered += 1
                    continue
                first = self._first.setdefault(canary.question.uid, verdict)
                if first is not verdict:
                    changed[name].append(differ(first, verdict))
                if verdict.flawed is not None:
                    right.append(verdict.flawed == canary.flawed)
        everything = [one for of_replica in changed.values() for one in of_replica]
        shares = {name: _share(of_replica) for name, of_replica in changed.items()}
        return CanaryReport(_share(everything), _share(right), unanswered / max(asked, 1), shares)


def differ(a: Verdict, b: Verdict) -> bool:
    if a.value is None or b.value is None:
        return a.value is not b.value
    return a.flawed is not b.flawed or abs(a.value - b.value) > TOLERANCE


def _share(of: Sequence[bool]) -> float | None:
    return sum(of) / len(of) if of else None
