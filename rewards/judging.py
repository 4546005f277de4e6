"""What a judge's verdict makes of the rule's record: the generative reward model inside a run.

    record of the rule --which samples (Judge.when)--> questions --service--> verdicts --> record, labelled

The rule comes first and stays on the record: `detail["rule_flawed"]` is its own label where it has one, so that a task
that knows the truth measures the judge. `detail["genrm"]` is the verdict. Nothing that failed over there is a value:
`on_failure` says what becomes of the sample.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Protocol

from rltk.rewards.genrm.options import GenRMOptions
from rltk.rewards.genrm.types import Question, Verdict
from rltk.rewards.scorer import masked
from rltk.trajectory import Record, RewardRecord, Trajectory

Item = tuple[Trajectory, Record]
KEPT = ("index", "paragraphs", "by", "agreement", "replies")  # of a verdict's detail, for samples and metrics


class Client(Protocol):
    """Of `GenRMClient`, what is needed here."""

    async def judge(self, questions: Sequence[Question], deadline_s: float | None = None) -> list[Verdict]: ...


class Judging:
    """`when`: which samples the judge is for, those that the rule found right | wrong | all that it scored."""

    def __init__(self, client: Client, options: GenRMOptions, when: str) -> None:
        self._client, self._options, self._when = client, options, when

    async def __call__(
        self, items: Sequence[Item], records: Sequence[RewardRecord], evaluation: bool = False
    ) -> list[RewardRecord]:
        """The records with the verdicts in them, in order, within reward.genrm.deadline_s or a little more.

        In an evaluation the rule's label of a flaw stands where it has one: there the judge is measured, not followed.
        What an answer is worth is the judge's to say there too, if it is in training (`wrong`, `all`); none of its
        failures takes a sample out.
        """
        if evaluation and not self._options.evaluate:
            return list(records)
        asked = [number for number, record in enumerate(records) if self._is_asked(record)]
        questions = [_question(*items[number], records[number]) for number in asked]
        verdicts = await self._client.judge(questions, self._options.deadline_s) if questions else []
        found = list(records)
        for number, verdict in zip(asked, verdicts, strict=True):
            found[number] = self._with(records[number], verdict, evaluation)
        return found

    def _is_asked(self, record: RewardRecord) -> bool:
        if record.value is None:
            return False
        return self._when == "all" or record.correct is (self._when == "right")

    def _with(self, record: RewardRecord, verdict: Verdict, evaluation: bool) -> RewardRecord:
        record = replace(record, detail={**record.detail, "rule_flawed": record.flawed, "genrm": _plain(verdict)})
        if verdict.value is None:
            return record if evaluation else self._failed(record, verdict)
        if verdict.flawed is not None and not (evaluation and record.flawed is not None):
            record = replace(record, flawed=verdict.flawed)
        if self._when == "all":
            return replace(record, value=verdict.value, correct=verdict.value > 0.5, reason="judged")
        if verdict.flawed is not None:
            return record
        # The rule said no; the judge may overrule it, and is asked nothing else.
        return replace(record, value=1.0, correct=True, reason="judged right") if verdict.value > 0.5 else record

    def _failed(self, record: RewardRecord, verdict: Verdict) -> RewardRecord:
        if self._options.on_failure != "mask":
            return replace(record, flawed=self._options.on_failure == "flawed")
        words = str(verdict.detail.get("reason") or verdict.detail.get("error") or "")
        out = masked(f"genrm_{verdict.cause}", f"the judge gave no verdict: {verdict.cause} {words}".strip())
        return replace(out, correct=record.correct, detail={**record.detail, **out.detail})


def _question(trajectory: Trajectory, record: Record, scored: RewardRecord) -> Question:
    """The solution as it reads, tool results included: a step that stands on one cannot be judged without it."""
    problem = next((m["content"] for m in reversed(record.messages) if m["role"] == "user"), "")
    data = {"correct": scored.correct}
    return Question(trajectory.uid, problem, trajectory.text, record.answer or None, trajectory.group_id, data)


def _plain(verdict: Verdict) -> dict[str, Any]:
    kept = {name: verdict.detail[name] for name in KEPT if name in verdict.detail}
    if verdict.value is None:
        kept["reason"] = str(verdict.detail.get("reason") or verdict.detail.get("error") or "")[:200]
    said = {"value": verdict.value, "flawed": verdict.flawed, "cause": verdict.cause, "seconds": verdict.seconds}
    return said | kept
