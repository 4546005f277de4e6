"""Several judges of one response: their mean, their worst case, or their mean less k standard deviations."""

from __future__ import annotations

import asyncio
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from rltk.errors import ConfigError
from rltk.rewards.genrm.asking import as_verdict
from rltk.rewards.genrm.judges import build_judge
from rltk.rewards.genrm.types import Ask, Judge, JudgeUnavailable, Question, Verdict

COMBINE = ("mean", "worst", "mean_minus_std")
TIE = 0.5  # a combined value of this much still counts as flawed: two judges who differ clear nobody


class Ensemble:
    """`judges`: names, mappings of a name and its options ({name: fapo, seed: 1, temperature: 0.6}), or built judges.

    `combine`: mean | worst (the minimum) | mean_minus_std (mean - k * population sd, at least 0). `asks`: one Ask for
    each judge, where they are different models; otherwise all use the one that `judge` is given. `flawed` is whether
    the combined value is at most .5, if any member labels, else None. A verdict needs every member's: without one
    the worst case is unknown, and the cause is that of the first that failed.
    """

    name = "ensemble"

    def __init__(
        self,
        judges: Sequence[str | Mapping[str, Any] | Judge],
        combine: str = "mean",
        k: float = 1.0,
        asks: Sequence[Ask] | None = None,
    ) -> None:
        if combine not in COMBINE:
            raise ConfigError(f"judge ensemble: combine={combine!r} must be one of {', '.join(COMBINE)}")
        if not isinstance(k, int | float) or not 0 <= k < float("inf"):
            raise ConfigError(f"judge ensemble: k={k!r} must be a number of at least 0")
        self.judges = [_member(judge) for judge in judges]
        if len(self.judges) < 2:
            raise ConfigError(f"judge ensemble: needs at least two judges, got {len(self.judges)}")
        versions = [judge.version for judge in self.judges]
        if asks is None and len(set(versions)) < len(versions):
            raise ConfigError(
                "judge ensemble: two judges are the same; give them other templates, temperatures or seeds"
            )
        if asks is not None and len(asks) != len(self.judges):
            raise ConfigError(f"judge ensemble: {len(asks)} asks for {len(self.judges)} judges")
        self.combine, self.k, self.asks = combine, float(k), asks
        kinds = {getattr(judge, "when", "all") for judge in self.judges}
        self.when = kinds.pop() if len(kinds) == 1 else "all"
        self.version = f"{self.name}/{combine},k={self.k:g}/[{' | '.join(versions)}]"

    async def judge(self, question: Question, ask: Ask) -> Verdict:
        return await as_verdict(self._judge(question, ask))

    async def _judge(self, question: Question, ask: Ask) -> Verdict:
        asks = self.asks or [ask] * len(self.judges)
        verdicts = await asyncio.gather(
            *(judge.judge(question, own) for judge, own in zip(self.judges, asks, strict=True))
        )
        values = []
        for judge, verdict in zip(self.judges, verdicts, strict=True):
            if verdict.value is None:
                raise JudgeUnavailable(verdict.cause, f"{judge.name}: {verdict.detail.get('reason', verdict.cause)}")
            values.append(verdict.value)
        value = self._combined(values)
        labelled = any(verdict.flawed is not None for verdict in verdicts)
        members = [
            {"name": judge.name, "value": verdict.value, "flawed": verdict.flawed, **verdict.detail}
            for judge, verdict in zip(self.judges, verdicts, strict=True)
        ]
        detail = {"combine": self.combine, "std": statistics.pstdev(values), "members": members}
        return Verdict(value, flawed=value <= TIE if labelled else None, detail=detail)

    def _combined(self, values: list[float]) -> float:
        if self.combine == "worst":
            return min(values)
        mean = statistics.fmean(values)
        return mean if self.combine == "mean" else max(0.0, mean - self.k * statistics.pstdev(values))


def _member(judge: str | Mapping[str, Any] | Judge) -> Judge:
    if isinstance(judge, str):
        judge = {"name": judge}
    built: Any = judge
    if isinstance(judge, Mapping):
        options = dict(judge)
        if "name" not in options:
            raise ConfigError(f"judge ensemble: {options} has no name")
        built = build_judge(options.pop("name"), **options)
    if not callable(getattr(built, "judge", None)):
        raise ConfigError(f"judge ensemble: {built.name} compares responses; members judge one")
    return built
