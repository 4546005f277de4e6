"""GenRMService: verdicts for whoever asks, from a pool of judge replicas. The generative reward model of a run.

  judge(questions) -> cache, single flight -> the judge (templates, parsing) -> session -> router -> replicas
                                                                                             |  least loaded, retries
  Verdict(value) | Verdict(None, cause) <----------------------------------------------------+  elsewhere, breakers

Nothing that fails in here is ever a value: it is a verdict without one, with its cause; what becomes of the sample is
the run's choice (reward.genrm.on_failure). Every question asked ends once, answered or unanswered, and is counted so.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import Counter, deque
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import asdict, replace
from typing import Any, TypeVar

import ray

from rltk import watch
from rltk.errors import ConfigError
from rltk.rewards.genrm.backends import Chat, EngineBackend, OpenAIBackend
from rltk.rewards.genrm.cache import VerdictCache, cache_key
from rltk.rewards.genrm.canary import CanaryReport, CanaryWatch, load_canaries
from rltk.rewards.genrm.judges import build_judge
from rltk.rewards.genrm.options import GenRMOptions
from rltk.rewards.genrm.router import Backend, Router
from rltk.rewards.genrm.types import Comparer, Comparison, Judge, JudgeUnavailable, Question, Verdict

log = logging.getLogger("rltk.genrm")

GRACE_S = 0.5  # past a question's deadline: the router keeps it too, and knows better what was waited for
KEPT_TIMES = 8192  # of the latest verdicts, for percentiles
Result = TypeVar("Result", Verdict, Comparison)


class GenRMService:
    """`ray.remote` is applied where it is placed, with `max_restarts=-1`, `max_task_retries=2` (judging has no effect
    outside) and `max_concurrency=concurrency(options)`; it can be used without Ray. Belongs to one event loop.

    replicas: handles of JudgeEngine actors, or their names; none with `options.url`. `backends` in their place: any
    other kind.
    """

    def __init__(
        self, options: GenRMOptions, replicas: Sequence[Any] = (), backends: Sequence[Backend] | None = None
    ) -> None:
        self._options = options
        self._judge = build_judge(options.judge, **options.judge_options)
        self._router = Router(_backends(options, replicas) if backends is None else backends, options)
        self._model = f"{options.url or ''} {options.model}@{options.revision}"
        self._cache = VerdictCache(options.cache)
        self._canaries = CanaryWatch(load_canaries(options.canary_file, getattr(self._judge, "when", "all")))
        self._counts: Counter[str] = Counter()
        self._causes: Counter[str] = Counter()
        self._seconds: deque[float] = deque(maxlen=KEPT_TIMES)

    async def ready(self) -> str:
        """When every replica answers: the judge's name and version. Raises what keeps one from it."""
        await self._router.ready()
        return f"{self._judge.name} {self._judge.version}"

    async def judge(self, questions: Sequence[Question], deadline_s: float | None = None) -> list[Verdict]:
        """One verdict for each question, in order, at most GRACE_S past `deadline_s` (reward.genrm.deadline_s). Never
        raises for what fails; cancelled, it stops the generations that nobody else waits for. Raises ConfigError if
        this judge only compares."""
        judge: Judge = self._able("judge")
        deadline = self._deadline(deadline_s)
        asked = (self._count(self._verdict(judge, question, deadline), question.uid) for question in questions)
        return list(await asyncio.gather(*asked))

    async def compare(self, problem: str, responses: Sequence[str], deadline_s: float | None = None) -> Comparison:
        """For judges that compare (pairwise, best_of_n), likewise. Raises ConfigError if this one does not."""
        comparer: Comparer = self._able("compare")
        deadline = self._deadline(deadline_s)
        session = self._router.session("compare", deadline)

        async def work() -> Comparison:
            async with asyncio.timeout(deadline - time.monotonic() + GRACE_S):
                return await comparer.compare(problem, responses, session.ask)

        return await self._count(_caught(work, _no_comparison, "compare"), "compare")

    async def canary(self) -> CanaryReport:
        """Ask every replica the canaries, past the cache and the counts. The first call sets what drift is against."""
        judge: Judge = self._able("judge")
        deadline = self._deadline(None)
        questions = [canary.question for canary in self._canaries.canaries]

        async def of(replica: str) -> list[Verdict]:
            asked = (self._ask(judge, question, deadline, replica) for question in questions)
            return list(await asyncio.gather(*asked))

        names = self._router.names
        answers = await asyncio.gather(*(of(name) for name in names))
        report = self._canaries.compare(dict(zip(names, answers, strict=True)))
        if report.drift:
            log.warning("the judge's verdicts on its canaries have changed: %s", asdict(report))
        return report

    async def stats(self) -> dict[str, Any]:
        """Since the start. asked = answered + unanswered + cancelled + in_flight, always; `causes` of the unanswered;
        joined and cached: verdicts that cost no generation; p50_s, p99_s: of the latest that did (None: none yet);
        router: see Router.stats."""
        names = ("asked", "answered", "unanswered", "cancelled", "joined", "cached")
        counts = {name: self._counts[name] for name in names}
        ended = counts["answered"] + counts["unanswered"] + counts["cancelled"]
        return {
            **counts,
            "in_flight": counts["asked"] - ended,
            "causes": dict(self._causes),
            "p50_s": _percentile(self._seconds, 0.50),
            "p99_s": _percentile(self._seconds, 0.99),
            "router": self._router.stats(),
        }

    async def stacks(self) -> str:
        return f"genrm service: {await self.stats()}\n{watch.stacks()}\n{await self._router.stacks()}"

    async def close(self) -> None:
        await self._router.close()

    # -- one question --------------------------------------------------------------------------------------------------

    async def _verdict(self, judge: Judge, question: Question, deadline: float) -> Verdict:
        """From the cache, or with whoever asks the same, or from the judge."""

        async def work() -> Verdict:
            key = cache_key(self._model, judge, question)
            async with asyncio.timeout(deadline - time.monotonic() + GRACE_S):
                verdict, how = await self._cache.get(key, lambda: self._ask(judge, question, deadline), deadline)
            if how != "asked":
                self._counts[how] += 1
            elif verdict.value is not None:
                self._seconds.append(verdict.seconds)
            return verdict

        return await _caught(work, _no_verdict, question.uid)

    async def _ask(self, judge: Judge, question: Question, deadline: float, only: str | None = None) -> Verdict:
        """The judge's verdict; never raises for what fails, as others may have joined."""
        session = self._router.session(question.uid, deadline, only)

        async def work() -> Verdict:
            async with asyncio.timeout(deadline - time.monotonic() + GRACE_S):
                verdict: Any = await judge.judge(question, session.ask)
            if not isinstance(verdict, Verdict):
                raise TypeError(f"the judge {judge.name} returned {type(verdict).__name__}, not a Verdict")
            return verdict

        return await _caught(work, _no_verdict, question.uid)

    async def _count(self, work: Awaitable[Result], uid: str) -> Result:
        """The ledger: whatever happens, a question that was asked ends in one of three ways."""
        self._counts["asked"] += 1
        ended, begin = "cancelled", time.monotonic()
        try:
            result = await work
            given = result.value is not None if isinstance(result, Verdict) else bool(result.scores)  # a tie is given
            ended = "answered" if given else "unanswered"
            if not given:
                self._causes[result.cause] += 1
                log.debug("no verdict on %s: %s %s", uid, result.cause, result.detail)
            return replace(result, seconds=time.monotonic() - begin)
        finally:
            self._counts[ended] += 1

    def _deadline(self, deadline_s: float | None) -> float:
        return time.monotonic() + (self._options.deadline_s if deadline_s is None else deadline_s)

    def _able(self, method: str) -> Any:
        if not hasattr(self._judge, method):
            other = "compares responses, it judges none alone" if method == "judge" else "judges one response alone"
            raise ConfigError(f"reward.genrm.judge={self._options.judge} {other}: it cannot {method}")
        return self._judge


def concurrency(options: GenRMOptions) -> int:
    """Calls that Ray must let into the service: what is over the bound is to be answered, not to wait in Ray."""
    return options.queue + options.replicas * options.max_sequences + 64


def _backends(options: GenRMOptions, replicas: Sequence[Any]) -> list[Backend]:
    if options.url is not None:
        return [OpenAIBackend(options)]
    if not replicas:
        raise ConfigError("the generative reward model has neither replicas nor reward.genrm.url: who shall judge?")
    chat = Chat(options)
    handles = [ray.get_actor(replica) if isinstance(replica, str) else replica for replica in replicas]
    return [EngineBackend(f"replica {number}", handle, chat, options) for number, handle in enumerate(handles)]


def _no_verdict(cause: str, detail: dict[str, Any]) -> Verdict:
    return Verdict(None, cause=cause, detail=detail)


def _no_comparison(cause: str, detail: dict[str, Any]) -> Comparison:
    return Comparison(None, cause=cause, detail=detail)


async def _caught(
    work: Callable[[], Awaitable[Result]], failed: Callable[[str, dict[str, Any]], Result], uid: str
) -> Result:
    """What the work gives, or a result that says why there is none."""
    try:
        return await work()
    except JudgeUnavailable as error:
        return failed(error.cause, {"reason": str(error)})
    except TimeoutError:
        return failed("timeout", {"reason": "its deadline passed"})
    except Exception as error:
        log.exception("judging %s failed", uid)
        return failed("internal", {"reason": f"{type(error).__name__}: {error}"})


def _percentile(seconds: Sequence[float], share: float) -> float | None:
    ordered = sorted(seconds)
    return ordered[min(int(share * len(ordered)), len(ordered) - 1)] if ordered else None
