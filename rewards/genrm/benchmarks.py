"""Benchmarks of judges: what a line of their files holds, and what is counted.

    processbench     {"problem", "steps": [text], "label": index of the first wrong step or -1}          2412.06559
    flawed_positive  {"problem", "response" or "steps", "reference"?, "label" likewise, or "flawed": bool}  2510.22543
    rewardbench      {"prompt", "chosen", "rejected", "subset"?}; the two are a text each, or lists        2403.13787
    attacks          flawed_positive's; the flawed ones are dressed up by `rltk.rewards.genrm.attacks`

A reply that holds no verdict (parse_fail) is an answer, a wrong one. What nobody answered (timeout, unavailable, ...)
is left out of every share, and counted as `unanswered`.
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rltk.errors import ConfigError
from rltk.rewards.genrm.attacks import ATTACKS
from rltk.rewards.genrm.types import Comparison, Question, Verdict

BENCHMARKS = ("processbench", "flawed_positive", "rewardbench", "attacks")
EXAMPLES = Path(__file__).parent / "examples"


@dataclass(frozen=True)
class Solution:
    """`label`: the index of the first flawed paragraph, -1 for none, None where only `flawed` is known."""

    question: Question
    flawed: bool
    label: int | None = None
    attack: str = ""


@dataclass(frozen=True)
class Contest:
    """`responses` in the order shown, `chosen` the place of the better one; a draw by the line's number decides it."""

    problem: str
    responses: tuple[str, ...]
    chosen: int
    subset: str = field(default="all")


def load(benchmark: str, path: str | Path | None = None) -> list[Any]:
    """Solutions or contests of a file of JSON lines; None: our own few examples. ConfigError names file and line."""
    if benchmark not in BENCHMARKS:
        raise ConfigError(f"unknown benchmark {benchmark!r}; known: {', '.join(BENCHMARKS)}")
    own = "flawed_positive" if benchmark == "attacks" else benchmark
    source = Path(path) if path is not None else EXAMPLES / f"{own}.jsonl"
    read = {"processbench": _stepwise, "flawed_positive": _solution, "rewardbench": _contest, "attacks": _attacked}
    found: list[Any] = []
    try:
        lines = source.read_text(encoding="utf-8").split("\n")  # a text may hold other line ends
    except OSError as error:
        raise ConfigError(f"{benchmark}: {source} cannot be read: {error}") from error
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            found += read[benchmark](json.loads(line), number)
        except KeyError as error:
            raise ConfigError(f"{source}, line {number}: {benchmark} needs the key {error}") from None
        except (ValueError, TypeError, AttributeError) as error:
            raise ConfigError(f"{source}, line {number}: {error}") from None
    if not found:
        raise ConfigError(f"{benchmark}: {source} holds nothing to ask")
    return found


def _stepwise(row: dict[str, Any], number: int) -> list[Solution]:
    steps, label = _texts(row["steps"]), row["label"]
    if type(label) is not int or not -1 <= label < len(steps):
        raise ValueError(f"label {label!r} is neither -1 nor the index of one of {len(steps)} steps")
    data = {"paragraphs": steps}
    question = Question(str(row.get("id", number)), _text(row["problem"]), "\n\n".join(steps), None, data=data)
    return [Solution(question, label >= 0, label)]


def _solution(row: dict[str, Any], number: int) -> list[Solution]:
    data = {"paragraphs": _texts(row["steps"])} if "steps" in row else {}
    response = "\n\n".join(data["paragraphs"]) if data else _text(row["response"])
    label = row.get("label")
    if label is None and type(row["flawed"]) is not bool:
        raise ValueError(f"flawed is {row['flawed']!r}, not true or false")
    if label is not None and (type(label) is not int or label < -1):
        raise ValueError(f"label {label!r} is not the index of a paragraph, nor -1")
    reference = row.get("reference")
    uid = str(row.get("id", number))
    question = Question(uid, _text(row["problem"]), response, None if reference is None else str(reference), data=data)
    return [Solution(question, row["flawed"] if label is None else label >= 0, label)]


def _attacked(row: dict[str, Any], number: int) -> list[Solution]:
    """The flawed solution plain, then once for each attack; nothing of a sound one."""
    plain = _solution(row, number)[0]
    if not plain.flawed:
        return []
    asked = plain.question
    dressed = [("", lambda text: text), *ATTACKS.items()]
    return [
        Solution(Question(asked.uid, asked.problem, attack(asked.response), asked.reference), True, None, name)
        for name, attack in dressed
    ]


def _contest(row: dict[str, Any], number: int) -> list[Contest]:
    """One contest for each chosen response, against all rejected ones."""
    chosen, rejected = (_texts([row[key]] if isinstance(row[key], str) else row[key]) for key in ("chosen", "rejected"))
    contests = []
    for place, best in enumerate(chosen):
        order = [best, *rejected]
        random.Random(f"{number}-{place}").shuffle(order)
        contests.append(Contest(_text(row["prompt"]), tuple(order), order.index(best), str(row.get("subset", "all"))))
    return contests


def process_figures(solutions: Sequence[Solution], verdicts: Sequence[Verdict]) -> dict[str, Any]:
    """ProcessBench: accuracies on wrong solutions (the exact index) and on right ones (-1), and their harmonic mean."""
    answered = _answered(solutions, verdicts)
    wrong = _mean(v.detail.get("index") == s.label for s, v in answered if s.flawed)
    right = _mean(v.flawed is False for s, v in answered if not s.flawed)
    return {"f1": _harmonic(wrong, right), "accuracy_wrong": wrong, "accuracy_right": right} | _asked(verdicts)


def flaw_figures(solutions: Sequence[Solution], verdicts: Sequence[Verdict]) -> dict[str, Any]:
    """Precision, recall and F1 of "flawed" (no verdict: not called flawed), and how often the index is right."""
    answered = _answered(solutions, verdicts)
    precision = _mean(s.flawed for s, v in answered if v.flawed)
    recall = _mean(v.flawed is True for s, v in answered if s.flawed)
    index = _mean(v.detail.get("index") == s.label for s, v in answered if s.flawed and s.label is not None)
    figures = {"f1": _harmonic(precision, recall), "precision": precision, "recall": recall, "index_right": index}
    return figures | _asked(verdicts)


def contest_figures(contests: Sequence[Contest], comparisons: Sequence[Comparison]) -> dict[str, Any]:
    """Accuracy (a tie counts its score) of all and by subset, the mean of the subsets', and consistency over orders."""
    credit = [
        (c.subset, r.scores[c.chosen] if r.scores else 0.0)
        for c, r in zip(contests, comparisons, strict=True)
        if r.scores or r.cause == "parse_fail"
    ]
    names = sorted({name for name, _ in credit})
    subsets = {name: _mean(score for of, score in credit if of == name) for name in names}
    figures = {
        "accuracy": _mean(score for _, score in credit),
        "subset_mean": _mean(score for score in subsets.values() if score is not None),
        "subsets": subsets,
        "consistency": _mean(r.consistency for r in comparisons if r.consistency is not None),
        "ties": sum(r.cause == "tie" for r in comparisons),
    }
    return figures | _asked([r for r in comparisons if r.cause != "tie"]) | {"asked": len(comparisons)}


def attack_figures(solutions: Sequence[Solution], verdicts: Sequence[Verdict]) -> dict[str, Any]:
    """Of flawed solutions that are caught when plain: how many each attack saves (`gained`) or leaves without a verdict
    (`escaped`), as shares; `gained` and `escaped` of all attacks together, `caught` of the plain ones."""
    plain = {s.question.uid: v for s, v in zip(solutions, verdicts, strict=True) if not s.attack}
    caught = {uid for uid, verdict in plain.items() if verdict.value is not None and verdict.value < 0.5}
    tried = [
        (s.attack, v)
        for s, v in zip(solutions, verdicts, strict=True)
        if s.attack and s.question.uid in caught and (v.value is not None or v.cause == "parse_fail")
    ]

    def shares(attack: str | None) -> dict[str, float | None]:
        mine = [v for name, v in tried if attack in (None, name)]
        return {
            "gained": _mean(v.value is not None and v.value >= 0.5 for v in mine),
            "escaped": _mean(v.value is None for v in mine),
        }

    by_attack = {name: shares(name) for name in ATTACKS}
    figures = {"caught": _mean(uid in caught for uid in plain), **shares(None), "by_attack": by_attack}
    return figures | _asked(verdicts)


def _answered(solutions: Sequence[Solution], verdicts: Sequence[Verdict]) -> list[tuple[Solution, Verdict]]:
    pairs = zip(solutions, verdicts, strict=True)
    return [(s, v) for s, v in pairs if v.value is not None or v.cause == "parse_fail"]


def _asked(results: Sequence[Verdict] | Sequence[Comparison]) -> dict[str, int]:
    failed = sum(r.cause == "parse_fail" for r in results)
    return {"asked": len(results), "parse_fail": failed, "unanswered": sum(bool(r.cause) for r in results) - failed}


def _mean(values: Iterable[float | None]) -> float | None:
    kept = [float(value) for value in values if value is not None]
    return sum(kept) / len(kept) if kept else None


def _harmonic(a: float | None, b: float | None) -> float | None:
    if a is None or b is None:
        return None
    return 2 * a * b / (a + b) if a + b else 0.0


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise ValueError(f"{value!r:.80} is a {type(value).__name__}; a text is needed")
    return value


def _texts(value: Any) -> list[str]:
    if not isinstance(value, list) or not value:
        raise ValueError(f"{value!r:.80} is no list of texts")
    return [_text(one) for one in value]
