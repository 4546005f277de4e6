"""A reward pool in a Ray actor, and behind it the judge, where the run has one."""

from __future__ import annotations

from collections.abc import Sequence

import ray

from rltk import watch
from rltk.rewards.genrm.client import GenRMClient
from rltk.rewards.genrm.judges import asked_when
from rltk.rewards.genrm.options import GenRMOptions
from rltk.rewards.judging import Judging
from rltk.rewards.pool import RewardPool
from rltk.rewards.scorer import ScorerSpec
from rltk.trajectory import Record, RewardRecord, Trajectory


@ray.remote(num_cpus=0, max_restarts=-1, max_task_retries=2)
class RewardWorker:
    """Scores on demand; any number of calls may be under way. Scoring has no side effect, so that Ray may restart the
    actor and repeat a call: a worker that dies costs time, not samples.

    `service`: name of the run's GenRMService actor, asked what `genrm` says once the rule has spoken; "": no judge.
    """

    def __init__(
        self,
        spec: ScorerSpec,
        processes: int = 2,
        sample_deadline_s: float = 10.0,
        memory_gib: float = 2.0,
        service: str = "",
        genrm: GenRMOptions | None = None,
    ) -> None:
        self._pool = RewardPool(spec, processes, sample_deadline_s, memory_gib)
        self._judging: Judging | None = None
        if service and genrm is not None:
            client = GenRMClient(ray.get_actor(service), genrm, "reward worker")
            self._judging = Judging(client, genrm, asked_when(genrm))

    async def ready(self) -> None:
        """Wait until every process has loaded the scorer. Raises InfrastructureError if one cannot."""
        await self._pool.warm_up()

    async def score(
        self, items: Sequence[tuple[Trajectory, Record]], deadline_s: float | None = None, evaluation: bool = False
    ) -> list[RewardRecord]:
        """See `RewardPool.score`: one record for each item, in order, within `deadline_s` seconds; the judge may take
        reward.genrm.deadline_s more."""
        records = await self._pool.score(items, deadline_s)
        return records if self._judging is None else await self._judging(items, records, evaluation)

    async def stats(self) -> dict[str, int]:
        """See `RewardPool.stats`."""
        return self._pool.stats()

    async def stacks(self) -> str:
        """What this actor and its processes are doing: for `rltk.watch`."""
        return f"{watch.stacks()}\n{await self._pool.stacks()}"

    async def close(self) -> None:
        """Kill the processes. The actor is of no use afterwards."""
        await self._pool.close()
