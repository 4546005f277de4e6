"""The run's judge as the driver sees it: its actors, its counts, and whether its verdicts drift."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from ray.exceptions import RayError

from rltk import watch
from rltk.config import Config
from rltk.errors import InfrastructureError, RltkError
from rltk.rewards.genrm.client import MARGIN_S

COUNTS = ("asked", "answered", "unanswered", "joined", "cached")  # of the service, since its start
LOOK_S = 30.0  # for the counts alone


@dataclass
class Judges:
    """Handles: engines of our own, and the service in front of them (one or none); and by which names other actors find
    them."""

    replicas: list[Any] = field(default_factory=list)
    services: list[Any] = field(default_factory=list)
    names: list[str] = field(default_factory=list)  # of the replicas
    service_name: str = ""

    @property
    def service(self) -> Any | None:
        return self.services[0] if self.services else None


class JudgeWatch:
    """What a step's row says of the service; {} for a run without a judge. `say(line)` tells people.

    genrm/drift, genrm/canary_accuracy, genrm/canary_unanswered   where the canaries were asked (see `CanaryReport`)
    genrm/p50_s, genrm/p99_s     of the latest verdicts that cost a generation
    genrm/total/<count>          questions since the service began, by what became of them
    genrm/total/replies, genrm/total/tokens   that the model wrote for them
    genrm/retries                generations that a second replica was asked for, since then
    genrm/replicas_down          replicas that get no questions now
    """

    def __init__(self, judges: Judges, config: Config, say: Callable[[str], None]) -> None:
        self._judges, self._options, self._say = judges, config.reward.genrm, say

    def begin(self) -> None:
        """The first look, which later ones are compared with. InfrastructureError if it fails or not one canary gets a
        verdict: no sample would."""
        service = self._judges.service
        if service is None:
            return
        limit = self._options.deadline_s + MARGIN_S
        try:
            report = watch.get(service.canary.remote(), "canary", "driver", "genrm service", limit, peek=[service])
        except RayError as error:
            words = str(error).strip().rpartition("\n")[2]
            raise InfrastructureError(f"the judge could not be asked its canaries: {words}") from error
        if report.unanswered == 1.0:
            raise InfrastructureError(
                f"the judge gave none of its canaries a verdict; the first: {report.why}. Fix: the judge, its engine "
                "or its server; a longer reward.genrm.context for too_long; or questions that fit the judge in "
                "reward.genrm.canary_file."
            )

    def figures(self, step: int, last: bool) -> dict[str, float]:
        if self._judges.service is None:
            return {}
        every = self._options.canary_every
        canary = self._canary() if last or (every and step % every == 0) else {}
        return canary | self._counts()

    def _counts(self) -> dict[str, float]:
        stats = self._ask("stats", LOOK_S)
        if stats is None:
            return {}
        found = {f"genrm/total/{name}": float(stats[name]) for name in COUNTS}
        found |= {f"genrm/{name}": stats[name] for name in ("p50_s", "p99_s") if stats[name] is not None}
        router = stats["router"]
        found |= {"genrm/total/replies": float(router["answered"]), "genrm/total/tokens": float(router["tokens"])}
        down = sum(replica["state"] != "closed" for replica in router["replicas"])
        return found | {"genrm/retries": float(router["retries"]), "genrm/replicas_down": float(down)}

    def _canary(self) -> dict[str, float]:
        report = self._ask("canary", self._options.deadline_s)
        if report is None:
            return {}
        if report.drift:
            self._say(
                f"the judge drifts: {report.drift:.1%} of its canaries are answered differently ({report.replicas})"
            )
        found = {"drift": report.drift, "canary_accuracy": report.accuracy, "canary_unanswered": report.unanswered}
        return {f"genrm/{name}": value for name, value in found.items() if value is not None}

    def _ask(self, method: str, limit: float) -> Any | None:
        """A look that fails is told and costs its figures, not the run: verdicts have their own ways to fail."""
        service = self._judges.service
        asked = getattr(service, method).remote()
        try:
            return watch.get(asked, method, "driver", "genrm service", limit + MARGIN_S, peek=[service])
        except (RltkError, RayError) as error:
            self._say(f"the judge's {method} could not be had: {type(error).__name__}: {str(error)[:200]}")
            return None
