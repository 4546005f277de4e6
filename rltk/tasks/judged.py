r"""What tasks share in which the model is the judge: how it is asked, its reward, and the figures of an evaluation.

It is asked in the very words of the judge `fapo` (rltk.rewards.genrm.judges.fapo), whose template `fapo_short.v1` and
the like show a problem and a solution in paragraphs. Its reply ends in \boxed{index of the first wrong one, or -1}.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from rltk.errors import ConfigError
from rltk.rewards.genrm.benchmarks import Solution, flaw_figures
from rltk.rewards.genrm.judges.fapo import FlawFinder
from rltk.rewards.genrm.parse import parse_index
from rltk.rewards.genrm.types import Question, Reply, Verdict
from rltk.trajectory import Record, RewardRecord, Trajectory

REWARDS = ("distance", "outcome", "step_ratio")
NOBODY = Question("", "", "", None)  # figures need the label alone


class Judged:
    """Mixed into a task: `template` of the judge, and `reward`:

    distance    +1 or -1 for the right verdict (flawed or not), less |index - label| / n where both say flawed
                (2510.22543; n paragraphs); -1 for a reply that holds no verdict
    outcome     the same without the distance
    step_ratio  of all paragraphs, the share judged right (the index wrong, all others right); 0 without a verdict.
                Kept as a warning: it is hacked (docs/genrm.md)
    """

    def __init__(self, template: str, reward: str):
        if reward not in REWARDS:
            raise ConfigError(f"task.reward={reward!r} is not one of {', '.join(REWARDS)}")
        self.finder = FlawFinder(template)
        self.reward = reward

    def asked(self, question: Question, label: int | None, flawed: bool, kind: str, level: str, **data: Any) -> Record:
        """The judge's problem. `label`: index of the first flawed paragraph, -1, or None where only `flawed` is known;
        `kind` names the error, for the figures by kind. The answer is the box that a right reply ends in."""
        known = {"label": label, "flawed": flawed, "kind": kind, "paragraphs": len(self.finder.paragraphs(question))}
        answer = str(label) if label is not None else "flawed"
        return Record(question.uid, self.finder.messages(question), answer, level, {**known, **data})

    def score(self, record: Record, text: str) -> RewardRecord:
        """`correct`: the verdict, flawed or not, is right; whether its index is, too, only `detail` says.

        A rule is not told how a reply ended, so one that was cut off behind a box is read like a whole one.
        """
        label, flawed, count = (record.data[key] for key in ("label", "flawed", "paragraphs"))
        index = parse_index(Reply(text, "stop", 0), count)
        detail = {"index": index, "label": label, "kind": record.data["kind"]}
        value = REWARD[self.reward](index, label, flawed, count)
        if index is None:
            return RewardRecord(value, reason="no verdict", correct=False, detail=detail)
        correct = (index >= 0) == flawed
        return RewardRecord(value, f"{'right' if correct else 'wrong'} verdict", correct=correct, detail=detail)

    def figures(self, records: Sequence[Record], trajectories: Sequence[Trajectory]) -> dict[str, float]:
        """`records` are the trajectories', in order. A figure that has nothing to count is left out.

        genrm/f1, precision, recall, index_right   of "flawed", as `rltk.rewards.genrm.harness` counts them, over sound
                                                   solutions and the kinds of error that training has
        genrm/f1/unseen, ...                       over sound solutions and the other kinds
        genrm/recall/kind/<kind>                   by kind of error
        genrm/parse_fail                           share of replies without a verdict
        """
        pairs = zip(records, trajectories, strict=True)
        told = [(r, _verdict(t.reward)) for r, t in pairs if t.reward is not None and t.reward.value is not None]
        unseen = [pair for pair in told if pair[0].data.get("unseen") or not pair[0].data["flawed"]]
        seen = [pair for pair in told if not pair[0].data.get("unseen")]
        figures: dict[str, float | None] = {"genrm/parse_fail": None if not told else _failed(told)}
        for part, suffix in ((seen, ""), (unseen, "/unseen")):
            if any(record.data["flawed"] for record, _ in part):
                found = _figures(part)
                figures |= {f"genrm/{k}{suffix}": found[k] for k in ("f1", "precision", "recall", "index_right")}
        for kind in sorted({record.data["kind"] for record, _ in told if record.data["flawed"]}):
            figures[f"genrm/recall/kind/{kind}"] = _figures([p for p in told if p[0].data["kind"] == kind])["recall"]
        return {name: value for name, value in figures.items() if value is not None}


def distance(index: int | None, label: int | None, flawed: bool, paragraphs: int) -> float:
    value = outcome(index, label, flawed, paragraphs)
    if value < 0 or index is None or index < 0 or label is None:
        return value
    return value - abs(index - label) / paragraphs


def outcome(index: int | None, label: int | None, flawed: bool, paragraphs: int) -> float:
    return 1.0 if index is not None and (index >= 0) == flawed else -1.0


def step_ratio(index: int | None, label: int | None, flawed: bool, paragraphs: int) -> float:
    """Most paragraphs are right, so whoever calls all of them right is nearly always right: nothing need be read."""
    if index is None:
        return 0.0
    if label is None:
        return 1.0 if (index >= 0) == flawed else 1 - 1 / paragraphs
    misjudged = {place for place in (index, label) if place >= 0} if index != label else set()
    return 1 - len(misjudged) / paragraphs


REWARD = {"distance": distance, "outcome": outcome, "step_ratio": step_ratio}


def _verdict(reward: RewardRecord) -> Verdict:
    index = reward.detail["index"]
    if index is None:
        return Verdict(None, cause="parse_fail")
    return Verdict(float(index < 0), flawed=index >= 0, detail={"index": index})


def _failed(told: Sequence[tuple[Record, Verdict]]) -> float:
    return sum(bool(verdict.cause) for _, verdict in told) / len(told)


def _figures(told: Sequence[tuple[Record, Verdict]]) -> dict[str, Any]:
    solutions = [Solution(NOBODY, r.data["flawed"], r.data["label"]) for r, _ in told]
    return flaw_figures(solutions, [verdict for _, verdict in told])
