"""Rolling jobs out over all rollout workers, from the driver's side."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any

import ray

from rltk import watch
from rltk.config import Config
from rltk.placement import job_shares
from rltk.rewards.genrm.client import MARGIN_S
from rltk.roles import Roles
from rltk.rollout.worker import Job, RolloutResult, Sampling


class RolloutPool:
    """Contiguous shares of the jobs to each worker; results in the order of the jobs. `progress(what, done, total)`.

    The requests that an engine sees, and their order, do not depend on the number of workers.
    """

    def __init__(self, roles: Roles, config: Config, progress: Callable[[str, int, int], None]) -> None:
        self.roles, self.progress = roles, progress
        judge = config.reward.genrm
        judging = judge.deadline_s + MARGIN_S if judge.enabled else 0.0
        self.deadline = config.deadlines.rollout + config.deadlines.reward + judging + 30
        self._busy: dict[Any, float] = {}  # seconds inside vLLM, by engine

    def __call__(self, jobs: Sequence[Job], sampling: Sampling, what: str = "generate") -> RolloutResult:
        workers = self.roles.workers
        shares = [list(jobs[share]) for share in job_shares(len(jobs), len(self.roles.engines), len(workers))]
        references = [w.rollout.remote(share, sampling) for w, share in zip(workers, shares, strict=True) if share]

        def poll() -> None:
            with suppress(ray.exceptions.RayError):  # a view must not end a run; who died is found out below
                counts = ray.get([w.progress.remote() for w in workers], timeout=5)
                self.progress(what, sum(done for done, _ in counts), len(jobs))

        # A worker bounds its own waits by the same deadline and names what is late; this one is the backstop.
        results = watch.get(
            references, what, "driver", "rollout workers", self.deadline, peek=[*workers, *self.roles.engines],
            poll=poll,
        )  # fmt: skip
        generated = max(r.generate_seconds for r in results)
        return RolloutResult(
            trajectories=[t for r in results for t in r.trajectories],
            failed={uid: reason for r in results for uid, reason in r.failed.items()},
            generate_seconds=generated,
            reward_seconds=max(r.generate_seconds + r.reward_seconds for r in results) - generated,
            partial={uid: state for r in results for uid, state in r.partial.items()},
        )

    def busy_seconds(self) -> float:
        """Seconds inside vLLM since the last call; of the busiest engine, as they run side by side."""
        engines = self.roles.engines
        stats = watch.get([e.stats.remote() for e in engines], "statistics", "driver", "rollout engines", 30)
        before, self._busy = self._busy, {e: s["busy_seconds"] for e, s in zip(engines, stats, strict=True)}
        return max(now - before.get(engine, 0.0) for engine, now in self._busy.items())
