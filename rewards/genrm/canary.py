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

EXAMPLES = Path(__file__).parent / "examples"
SHIPPED = EXAMPLES / "canary.jsonl"
SHIPPED_FOR_WRONG = EXAMPLES / "canary_wrong.jsonl"  # answers of which the rule says no, rightly or not
FORMAT = 'each line is {"problem": text, "response": text, "reference": text or null, "flawed": true or false}'
TOLERANCE = 0.1  # of a value: batches of other sizes round otherwise
UNREADABLE = "parse_fail"  # the model's own doing, unlike every other cause; it counts as a verdict here


@dataclass(frozen=True)
class Canary:
    question: Question
    flawed: bool


@dataclass(frozen=True)
class CanaryReport:
    """Shares in [0, 1]; None: nothing to compare.

    drift: of the answers to questions that were answered before, those that differ from what most replicas said at
    first; `replicas`: the same by replica. accuracy: of the verdicts, the right ones (a judge that gives no label says
    "flawed" with a value of at most .5). unanswered: of all asked, without verdict. why: of the first of those.
    """

    drift: float | None
    accuracy: float | None
    unanswered: float
    replicas: dict[str, float | None]
    why: str = ""


def load_canaries(path: str | None, when: str = "all") -> list[Canary]:
    """Those of the file, or ours for a judge that is asked about such answers (`when`: see Judge). Raises ConfigError
    for a file that cannot be read, is empty, or whose lines are not such questions."""
    source = Path(path) if path else SHIPPED_FOR_WRONG if when == "wrong" else SHIPPED
    try:
        lines = source.read_text(encoding="utf-8").split("\n")
    except (OSError, ValueError) as error:
        raise ConfigError(f"canaries cannot be read from {source}: {error!r}; {FORMAT}") from error
    found = []
    for number, line in enumerate(lines, 1):
        try:
            found += [_canary(len(found), json.loads(line))] if line.strip() else []
        except (ValueError, KeyError, TypeError) as error:
            words = f"canaries cannot be read from {source}, line {number}: {error!r}"
            raise ConfigError(f"{words}; {FORMAT}") from error
    if not found:
        raise ConfigError(f"{source} (reward.genrm.canary_file) holds no canaries")
    return found


def _canary(number: int, row: Any) -> Canary:
    problem, response, reference, flawed = row["problem"], row["response"], row.get("reference"), row["flawed"]
    texts = isinstance(problem, str) and isinstance(response, str) and isinstance(reference, str | None)
    if not (texts and isinstance(flawed, bool)):
        raise TypeError("something of another type")
    return Canary(Question(f"canary-{number}", problem, response, reference), flawed)


class CanaryWatch:
    """What the canaries' first verdicts were: of several replicas', the one that most of them gave."""

    def __init__(self, canaries: Sequence[Canary]) -> None:
        self.canaries = list(canaries)
        self._first: dict[str, Verdict] = {}

    def compare(self, answers: Mapping[str, Sequence[Verdict]]) -> CanaryReport:
        """answers: by replica, one verdict for each canary, in order."""
        changed: dict[str, list[bool]] = {name: [] for name in answers}
        right: list[bool] = []
        asked = unanswered = 0
        why = ""
        for number, canary in enumerate(self.canaries):
            given = {name: verdicts[number] for name, verdicts in answers.items()}
            said = {name: verdict for name, verdict in given.items() if verdict.value is not None or _unread(verdict)}
            asked += len(given)
            unanswered += len(given) - len(said)
            why = why or next((_why(verdict) for name, verdict in given.items() if name not in said), "")
            if said:
                first = self._first.setdefault(canary.question.uid, _most_said(list(said.values())))
            for name, verdict in said.items():
                if first is not verdict:
                    changed[name].append(differ(first, verdict))
                if verdict.value is not None:
                    flawed = verdict.value <= 0.5 if verdict.flawed is None else verdict.flawed
                    right.append(flawed == canary.flawed)
        everything = [one for of_replica in changed.values() for one in of_replica]
        shares = {name: _share(of_replica) for name, of_replica in changed.items()}
        return CanaryReport(_share(everything), _share(right), unanswered / max(asked, 1), shares, why)


def _why(verdict: Verdict) -> str:
    return f"{verdict.cause}: {verdict.detail.get('reason', '')}"


def _unread(verdict: Verdict) -> bool:
    return verdict.cause == UNREADABLE


def _most_said(verdicts: Sequence[Verdict]) -> Verdict:
    """A replica that writes garbage from the start is not what the others are held against."""
    return max(verdicts, key=lambda one: (sum(not differ(one, other) for other in verdicts), one.value is not None))


def differ(a: Verdict, b: Verdict) -> bool:
    if a.value is None or b.value is None:
        return a.value is not b.value
    return a.flawed is not b.flawed or abs(a.value - b.value) > TOLERANCE


def _share(of: Sequence[bool]) -> float | None:
    return sum(of) / len(of) if of else None
