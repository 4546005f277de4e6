"""The actors of a run: how each is started and where."""

from __future__ import annotations

import os
import secrets
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import ray

from rltk import watch
from rltk.config import Config
from rltk.judges import Judges
from rltk.kv_size import context
from rltk.learner.group import LearnerGroup
from rltk.learner.settings import learner_settings
from rltk.placement import Placement, judge_replicas, served_engines
from rltk.rewards.actor import RewardWorker
from rltk.rewards.genrm.client import MARGIN_S
from rltk.rewards.genrm.engine import JudgeEngine, replica_options
from rltk.rewards.genrm.engine import concurrency as replica_calls
from rltk.rewards.genrm.service import GenRMService
from rltk.rewards.genrm.service import concurrency as service_calls
from rltk.rewards.scorer import ScorerSpec
from rltk.rollout.actor import EngineActor
from rltk.rollout.engine import EngineOptions
from rltk.rollout.tools.executor import ToolExecutor, concurrency
from rltk.rollout.worker import RolloutWorker

Say = Callable[[str], None]  # told what is waited for: starting on a GPU takes minutes


def scorer_spec(config: Config) -> ScorerSpec:
    """What the reward processes load: the task's own rule, or the user's function."""
    if config.reward.path is not None:
        return ScorerSpec(config.reward.path, dict(config.reward.options), "function")
    limits = {
        "max_prompt_tokens": config.task.max_prompt_tokens,
        "max_response_tokens": config.task.max_response_tokens,
    }
    # An answer that the task's own rule cannot score in time is a wrong answer; a user's function may just be slow.
    return ScorerSpec(config.task.target, {**limits, **config.task.options}, "task", on_timeout="wrong")


def engine_options(config: Config, placement: Placement) -> EngineOptions:
    return EngineOptions(
        model=config.model.path,
        dtype=config.rollout.dtype,
        context=context(config),
        device=placement.device,
        max_sequences=config.rollout.max_sequences,
        kv_cache_gib=config.rollout.kv_cache_gib,
        gpu_memory_share=config.rollout.gpu_memory_share,
        enforce_eager=config.rollout.enforce_eager,
        threads=placement.engine_threads if placement.device == "cpu" else 0,
        seed=config.seed,
        kv=config.kv,
    )


@dataclass
class Roles:
    """Handles of every actor; `learner` is None for an evaluation, which trains nothing."""

    engines: list[Any] = field(default_factory=list)
    workers: list[Any] = field(default_factory=list)
    rewards: list[Any] = field(default_factory=list)
    executors: list[Any] = field(default_factory=list)
    judges: Judges = field(default_factory=Judges)
    learner: LearnerGroup | None = None

    def named(self) -> dict[str, Any]:
        """Every actor by its name, as in `rollout engine 0`."""
        kinds = {"rollout engine": self.engines, "rollout worker": self.workers, "reward worker": self.rewards}
        kinds |= {"tool executor": self.executors, "judge": self.judges.replicas, "genrm service": self.judges.services}
        kinds["learner rank"] = self.learner.ranks if self.learner else []
        return {f"{kind} {number}": actor for kind, actors in kinds.items() for number, actor in enumerate(actors)}

    def name_of(self, actor_id: str | None) -> str:
        """Of the actor that an error speaks of by its id (hex)."""
        names = (name for name, actor in self.named().items() if actor._actor_id.hex() == actor_id)
        return next(names, f"actor {actor_id}")

    def stop(self) -> None:
        """End every actor of this run, at once. The cluster itself is left to whoever started it."""
        for actor in self.named().values():
            ray.kill(actor)


def start_roles(config: Config, placement: Placement, train: bool = True, say: Say = lambda what: None) -> Roles:
    """Start every role: at the same time, but on a GPU that they share one by one. Returns when all stand. What keeps
    one from it is raised, and none is left."""
    roles = Roles()
    try:
        _start(roles, config, placement, train, say)
    except BaseException:
        roles.stop()
        raise
    return roles


def cache_report(roles: Roles, config: Config) -> dict[str, Any]:
    """Of the engines, which are alike: what was proved to run of a compressed cache; {}: vLLM's own."""
    return watch.get(
        roles.engines[0].cache.remote(), "say its cache", "driver", "rollout engine", config.deadlines.sync
    )


def tool_report(roles: Roles, config: Config) -> dict[str, Any]:
    """What the tool executors have: {"isolation": ..., "tools": [...]} of the weakest; {}: no tools."""
    asked = [executor.ready.remote() for executor in roles.executors]
    found = watch.get(asked, "say their isolation", "driver", "tool executors", config.deadlines.sync)
    return min(found, key=lambda report: report["isolation"] == "strict") if found else {}


def _start(roles: Roles, config: Config, placement: Placement, train: bool, say: Say) -> None:
    """Fills `roles` as it goes, so that whoever called knows of every actor there is."""
    if train:
        roles.learner = _learner(config, placement)
        if placement.gpu_shared:
            # Ranks take their places first: engines alone would be packed onto few GPUs, and no rank fit beside them.
            say("place the learner ranks")
            _wait_started(roles.learner.placed(), "learner ranks", roles.learner.ranks, config)
    for number in range(config.rollout.engines):
        roles.engines.append(_engine(config, placement))
        if placement.gpu_shared:
            # vLLM measures the device's memory while it starts, and takes what others allocate then for its own.
            say(f"start rollout engine {number}")
            _wait_started([roles.engines[-1].ready.remote()], "rollout engine", roles.engines, config)
    start_judges(roles.judges, config, placement, say)
    reward = config.reward
    for _ in range(reward.workers):
        placed = RewardWorker.options(num_cpus=placement.reward_cpus)
        spec, service = scorer_spec(config), roles.judges.service_name
        roles.rewards.append(
            placed.remote(spec, reward.processes, reward.deadline_s, reward.memory_gib, service, reward.genrm)
        )
    roles.executors += _executors(config, placement)
    deadlines = {"rollout": config.deadlines.rollout, "reward": config.deadlines.reward}
    deadlines |= {"judge": reward.genrm.deadline_s + MARGIN_S} if reward.genrm.enabled else {}
    for served in served_engines(config.rollout.engines, config.rollout.workers):
        worker = ray.remote(RolloutWorker).options(num_cpus=placement.worker_cpus, runtime_env=_environment())
        engines = [roles.engines[number] for number in served]
        roles.workers.append(
            worker.remote(
                config.model.path, engines, roles.rewards, deadlines, config.model.chat_template,
                config.tools, roles.executors, config.attc, config.dtsr,
            )
        )  # fmt: skip
    say("start the roles")
    waiting = [
        *(roles.learner.start() if roles.learner else []),
        *(role.ready.remote() for role in (*roles.engines, *roles.workers, *roles.rewards, *roles.executors)),
        *(service.ready.remote() for service in roles.judges.services),  # it waits for its replicas
    ]
    _wait_started(waiting, "the roles", list(roles.named().values()), config)


def _engine(config: Config, placement: Placement) -> Any:
    """A new engine actor, on its way up with the weights of the model folder."""
    return (
        ray.remote(EngineActor)
        .options(
            num_cpus=placement.engine_cpus,
            num_gpus=placement.engine_gpus,
            runtime_env=_environment(),
            max_concurrency=64,
        )
        .remote(engine_options(config, placement))
    )


def _executors(config: Config, placement: Placement) -> list[Any]:
    """Ray restarts one that dies: a call has no effect outside it, so that whoever asked asks again."""
    tools = config.tools
    if not tools.enabled:
        return []
    actor = ray.remote(ToolExecutor).options(
        num_cpus=placement.tool_cpus, max_restarts=-1, max_concurrency=concurrency(tools)
    )
    return [actor.remote(tools) for _ in range(tools.executors)]


def start_judges(judges: Judges, config: Config, placement: Placement, say: Say = lambda what: None) -> None:
    """Ray restarts replicas, whose weights never change, and the service, which holds nothing but a cache."""
    options, run = config.reward.genrm, secrets.token_hex(4)
    for number in range(judge_replicas(config)):
        # By name, as Ray warns of an actor that restarts and holds another's handle from its start.
        judges.names.append(f"judge-{run}-{number}")
        actor = ray.remote(JudgeEngine).options(
            name=judges.names[-1], num_cpus=placement.judge_cpus, num_gpus=placement.judge_gpus, max_restarts=-1,
            max_concurrency=replica_calls(options), runtime_env=_environment(),
        )  # fmt: skip
        threads = placement.judge_threads if placement.device == "cpu" else 0
        judges.replicas.append(actor.remote(replica_options(options, placement.device, threads, config.seed)))
        if placement.gpu_shared:
            say(f"start judge {number}")
            _wait_started([judges.replicas[-1].ready.remote()], "judge", judges.replicas, config)
    if options.enabled:
        service = ray.remote(GenRMService).options(
            name=f"genrm-{run}", num_cpus=0, max_restarts=-1, max_task_retries=2,
            max_concurrency=service_calls(options), runtime_env=_environment(),
        )  # fmt: skip
        judges.services.append(service.remote(options, judges.names))
        judges.service_name = f"genrm-{run}"


def _learner(config: Config, placement: Placement) -> LearnerGroup:
    """New ranks, which load nothing before `start`."""
    threads = placement.rank_threads if placement.device == "cpu" else 0
    return LearnerGroup(
        learner_settings(config, placement.device, threads), config.learner.ranks,
        placement.rank_cpus, placement.rank_gpus, config.deadlines.learner, config.deadlines.start,
    )  # fmt: skip


def _environment() -> dict[str, Any]:
    return {"env_vars": {"HF_HUB_OFFLINE": os.environ.get("HF_HUB_OFFLINE", "1")}}


def _wait_started(references: list[Any], what: str, actors: list[Any], config: Config) -> None:
    """All at once, so that the first failure is heard at once."""
    watch.get(references, "start", "driver", what, config.deadlines.start, peek=actors)


# -- after a death -----------------------------------------------------------------------------------------------------


def replace_dead(roles: Roles, config: Config, placement: Placement) -> list[int]:
    """Start a new engine for each that has died, and tell the workers. Returns which there were.

    The new ones still have the model folder's weights: publish before the next request.
    """
    dead = [number for number, engine in enumerate(roles.engines) if not _alive(engine)]
    for number in dead:
        ray.kill(roles.engines[number])  # one that is merely out of reach must not come back beside its successor
        roles.engines[number] = _engine(config, placement)
    for number in dead:
        ready = roles.engines[number].ready.remote()
        watch.get(ready, "restart", "driver", "rollout engine", config.deadlines.start, peek=[roles.engines[number]])
    dropped = [engine.drop.remote() for engine in roles.engines]
    watch.get(dropped, "drop requests", "driver", "rollout engines", config.deadlines.sync, peek=roles.engines)
    told = [
        worker.set_engines.remote([roles.engines[number] for number in served])
        for worker, served in zip(roles.workers, served_engines(len(roles.engines), len(roles.workers)), strict=True)
    ]
    watch.get(told, "hear of new engines", "driver", "rollout workers", config.deadlines.sync, peek=roles.workers)
    return dead


def restart_learner(roles: Roles, config: Config, placement: Placement) -> None:
    """A new learner group in place of one that lost a rank, at the weights of the model folder. RankDiedError if it
    loses one as it starts."""
    assert roles.learner is not None
    roles.learner.stop()
    roles.learner = _learner(config, placement)
    roles.learner.stand()


def _alive(actor: Any) -> bool:
    try:
        watch.get(actor.stats.remote(), "sign of life", "driver", "rollout engine", 30, peek=[actor])
        return True
    except ray.exceptions.RayActorError:
        return False
