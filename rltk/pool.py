"""Rolling jobs out over all rollout workers, from the driver's side."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import suppress

import ray

from rltk import watch
from rltk.config import Deadlines
from rltk.roles import Roles
from rltk.rollout.worker import Job, RolloutResult, Sampling


class RolloutPool:
    """Contiguous shares of the jobs to each worker; results in the order of the jobs. `progress(what, done, total)`."""

    def __init__(self, roles: Roles, deadlines: Deadlines, progress: Callable[[str, int, int], None]) -> None:
        self.roles, self.progress = roles, progress
        self.deadline = deadlines.rollout + deadlines.reward + 30

    def __call__(self, jobs: Sequence[Job], sampling: Sampling, what: str = "generate") -> RolloutResult:
        workers = self.roles.workers
        bounds = [len(jobs) * i // len(workers) for i in range(len(workers) + 1)]
        shares = [list(jobs[a:b]) for a, b in zip(bounds, bounds[1:], strict=False)]
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
        )
