"""GenRMClient: the way to the service for whoever wants verdicts. It never raises for what fails over there."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import ray
from ray.exceptions import RayError

from rltk import watch
from rltk.rewards.genrm.options import GenRMOptions
from rltk.rewards.genrm.types import Comparison, Question, Verdict

MARGIN_S = 10.0  # past the deadline, for the way there and back and a service that was just restarted


class GenRMClient:
    """`service`: handle of a GenRMService actor; `owner`: who waits, for the logs. Cancelled, the question is too."""

    def __init__(self, service: Any, options: GenRMOptions, owner: str = "rollout worker") -> None:
        self._service, self._options, self._owner = service, options, owner

    async def judge(self, questions: Sequence[Question], deadline_s: float | None = None) -> list[Verdict]:
        """One verdict for each question, in order, within about `deadline_s` seconds (reward.genrm.deadline_s)."""
        if not questions:
            return []
        limit = self._options.deadline_s if deadline_s is None else deadline_s
        found, cause, words = await self._call(
            lambda: self._service.judge.remote(list(questions), limit), f"judge {len(questions)} responses", limit
        )
        return found if found is not None else [Verdict(None, cause=cause, detail={"error": words}) for _ in questions]

    async def compare(self, problem: str, responses: Sequence[str], deadline_s: float | None = None) -> Comparison:
        limit = self._options.deadline_s if deadline_s is None else deadline_s
        found, cause, words = await self._call(
            lambda: self._service.compare.remote(problem, list(responses), limit),
            f"compare {len(responses)} responses", limit,
        )  # fmt: skip
        return found if found is not None else Comparison(None, cause=cause, detail={"error": words})

    async def _call(self, ask: Callable[[], Any], name: str, limit: float) -> tuple[Any, str, str]:
        """The answer, or None, a cause and words."""
        reference, ended = None, False
        try:
            reference = ask()
            answer = await watch.wait(
                reference, name, self._owner, "genrm service", limit + MARGIN_S,
                peek=lambda: self._service.stacks.remote(),
            )  # fmt: skip
            ended = True
            return answer, "", ""
        except watch.DeadlineError as error:
            return None, "timeout", str(error)
        except Exception as error:  # it died, or is out of reach
            ended = isinstance(error, RayError)
            return None, "unavailable", f"{type(error).__name__}: {str(error)[:500]}"
        finally:
            if reference is not None and not ended:
                ray.cancel(reference)
