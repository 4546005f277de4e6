"""Who gets how much of the machine. The roles take turns (max_staleness=0): engines sample, then ranks train.

So threads are not divided between engines and ranks: each has all cores in its turn. Ray's `num_cpus` only admits
actors; its shares are scaled so that every role fits, on 2 cores too. GPUs: a role has one for itself where there are
enough; otherwise engines, judges and ranks share each GPU, by `rollout.gpu_memory_share` and
`reward.genrm.gpu_memory_share`; the ranks have the rest.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from rltk.config import Config
from rltk.devices import cores, device, gpus

# Ray CPUs of one actor where there is room for everybody. Reward processes and workers mostly wait.
RAY_CPUS = {"engine": 1.0, "worker": 0.25, "reward": 0.25, "tool": 0.25, "judge": 1.0, "rank": 1.0}
ROOM = 0.95  # of the cores is given to roles; the rest leaves short-lived tasks a place


@dataclass(frozen=True)
class Placement:
    """Resources of one actor of each kind. `*_cpus`, `*_gpus` are Ray's num_cpus and num_gpus."""

    device: str  # cpu | gpu
    cores: int
    gpus: int  # 0 on a CPU
    engine_cpus: float
    worker_cpus: float
    reward_cpus: float
    tool_cpus: float
    judge_cpus: float
    rank_cpus: float
    engine_gpus: float
    judge_gpus: float
    rank_gpus: float
    engine_threads: int
    judge_threads: int
    rank_threads: int
    gpu_shared: bool  # engines, judges and ranks live on the same GPUs
    engines_per_gpu: int
    judges_per_gpu: int
    learner_memory_share: float  # of a GPU's memory, what the engines and judges on it leave to the rank


def place(config: Config) -> Placement:
    """Never fails: `rltk.checks.check` says what does not fit."""
    where, have = device(config.cluster), cores()
    engines, ranks = config.rollout.engines, config.learner.ranks
    executors = config.tools.executors if config.tools.enabled else 0
    judges = judge_replicas(config)
    counts = {
        "engine": engines, "worker": config.rollout.workers, "reward": config.reward.workers, "tool": executors,
        "judge": judges, "rank": ranks,
    }  # fmt: skip
    wanted = sum(RAY_CPUS[role] * count for role, count in counts.items())
    scale = min(1.0, ROOM * have / max(wanted, 1e-9))
    cpus = {role: max(0.01, _floor(share * scale)) for role, share in RAY_CPUS.items()}

    cards = max(1, gpus()) if where == "gpu" else 0  # 1: a cluster elsewhere, of which nothing is known here
    shared = where == "gpu" and engines + judges + ranks > cards
    crowd, judge_crowd = (math.ceil(engines / cards), math.ceil(judges / cards)) if shared else (1, min(judges, 1))
    share, judge_share = config.rollout.gpu_memory_share, config.reward.genrm.gpu_memory_share
    left = round(1.0 - share * crowd - judge_share * judge_crowd, 4) if shared else 1.0
    return Placement(
        device=where,
        cores=have,
        gpus=cards,
        engine_cpus=cpus["engine"],
        worker_cpus=cpus["worker"],
        reward_cpus=cpus["reward"],
        tool_cpus=cpus["tool"],
        judge_cpus=cpus["judge"],
        rank_cpus=cpus["rank"],
        engine_gpus=0.0 if where == "cpu" else (_floor(share) if shared else 1.0),
        judge_gpus=0.0 if where == "cpu" else (_floor(judge_share) if shared else 1.0),
        rank_gpus=0.0 if where == "cpu" else max(0.0, _floor(left)),
        engine_threads=config.rollout.threads or max(1, have // max(1, engines)),
        # A judge works while the engines do, on the same cores.
        judge_threads=config.reward.genrm.threads or max(1, have // (engines + max(1, judges))),
        rank_threads=config.learner.threads or max(1, have // max(1, ranks)),
        gpu_shared=shared,
        engines_per_gpu=crowd if where == "gpu" else 0,
        judges_per_gpu=judge_crowd if where == "gpu" else 0,
        learner_memory_share=left if where == "gpu" else 0.0,
    )


def judge_replicas(config: Config) -> int:
    """Engines of our own that judge."""
    judge = config.reward.genrm
    return judge.replicas if judge.enabled and not judge.url else 0


def served_engines(engines: int, workers: int) -> list[range]:
    """The engines that each rollout worker serves: neighbours, and each engine has one worker alone.

    Two workers on one engine would race, and the order in which an engine sees requests decides the last bits.
    """
    return [range(engines * n // workers, engines * (n + 1) // workers) for n in range(workers)]


def job_shares(jobs: int, engines: int, workers: int) -> list[slice]:
    """Jobs of each worker: those of its engines, had one worker split them all over the engines."""
    size, extra = divmod(jobs, engines)
    first = [engine * size + min(engine, extra) for engine in range(engines + 1)]  # job of each engine
    return [slice(first[served.start], first[served.stop]) for served in served_engines(engines, workers)]


def _floor(value: float) -> float:
    """To hundredths, downwards, so that a sum never passes its whole."""
    return math.floor(value * 100 + 1e-6) / 100
