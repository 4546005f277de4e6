"""What a run will do, before it does it: roles and their share of the machine, batch arithmetic, memory, files.

`dry_run=true` prints it. No torch, no Ray: numbers come from the Config and from the model folder's files.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from rltk.checks import run_dir
from rltk.config import Config
from rltk.kv_size import cache_size, describe, trajectory_tokens
from rltk.model_folder import DTYPE_BYTES, ModelFacts, facts
from rltk.placement import Placement, judge_replicas, place

ADAM_BYTES = 8  # two fp32 moments a parameter
MASTER_BYTES = 4  # the fp32 copy that bf16 training steps


@dataclass(frozen=True)
class Role:
    """One kind of actor. `cpus`, `gpus` are Ray's shares of one; `threads` are what it computes with."""

    name: str
    actors: int
    cpus: float
    gpus: float
    threads: int
    note: str


@dataclass(frozen=True)
class BatchPlan:
    """From prompts to optimizer steps. Token counts are upper bounds: every prompt and response at its longest."""

    prompts: int
    samples: int
    sequences: int  # a training step
    minibatches: int
    sequences_per_minibatch: int
    ranks: int
    sequences_per_rank: int  # of a minibatch; ranks are balanced by tokens, so this is the even share, rounded up
    tokens_per_sequence: int
    tokens_per_rank: int
    micro_batches: int  # a rank and minibatch
    steps: int
    optimizer_steps: int  # in the run
    response_tokens: int  # sampled in the run's training


@dataclass(frozen=True)
class EvaluationPlan:
    times: int
    problems: int
    samples: int
    greedy: bool
    sequences: int  # each time


@dataclass(frozen=True)
class Plan:
    name: str
    algorithm: str
    task: str
    model: str
    folder: Path
    placement: Placement
    roles: tuple[Role, ...]
    batch: BatchPlan
    evaluation: EvaluationPlan
    facts: ModelFacts
    memory: tuple[tuple[str, str], ...]  # (what, how much)
    written: tuple[tuple[str, str], ...]  # (path in the run folder, what)


def make_plan(config: Config) -> Plan:
    """The plan of a config that `rltk.checks.check` has passed."""
    placement, model = place(config), facts(Path(config.model.path))
    return Plan(
        name=config.name,
        algorithm=config.algorithm.path or config.algorithm.name,
        task=config.task.name if config.task.name != "custom" else config.task.target,
        model=config.model.name,
        folder=run_dir(config),
        placement=placement,
        roles=_roles(config, placement),
        batch=_batch(config),
        evaluation=_evaluation(config),
        facts=model,
        memory=_memory(config, placement, model),
        written=_written(config),
    )


def _roles(config: Config, at: Placement) -> tuple[Role, ...]:
    rollout, reward, learner = config.rollout, config.reward, config.learner
    rule = reward.path or "the task's rule"
    scoring = f"{rule}, in {reward.processes} killable processes each, {reward.deadline_s:g} s a sample"
    training = f"DeepSpeed ZeRO-{learner.zero_stage}, {learner.dtype}, lr {learner.lr:g} {learner.schedule}"
    engine = f"vLLM, {rollout.dtype}"
    return (
        Role("rollout engine", rollout.engines, at.engine_cpus, at.engine_gpus, at.engine_threads, engine),
        Role("rollout worker", rollout.workers, at.worker_cpus, 0.0, 1, "turns, tokenizer"),
        *_executors(config, at),
        Role("reward worker", reward.workers, at.reward_cpus, 0.0, reward.processes, scoring),
        *_judges(config, at),
        Role("learner rank", learner.ranks, at.rank_cpus, at.rank_gpus, at.rank_threads, training),
    )


def _executors(config: Config, at: Placement) -> Iterator[Role]:
    from rltk.rollout.tools.registry import environment

    tools = config.tools
    if tools.enabled:
        runs = f", isolation {tools.jail.isolation}" if "python" in tools.use else ""
        format, calls = ("an environment", "actions") if environment(tools) else (tools.format, "calls")
        note = f"{', '.join(tools.use)} ({format}), at most {tools.max_calls} {calls} a trajectory{runs}"
        yield Role("tool executor", tools.executors, at.tool_cpus, 0.0, tools.slots, note)


def _judges(config: Config, at: Placement) -> Iterator[Role]:
    options = config.reward.genrm
    if not options.enabled:
        return
    asked = f"judge {options.judge}, {options.deadline_s:g} s a question, on failure {options.on_failure}"
    if options.url:
        yield Role("genrm service", 1, 0.0, 0.0, 1, f"{asked}; asks {options.model} at {options.url}")
        return
    yield Role("judge", options.replicas, at.judge_cpus, at.judge_gpus, at.judge_threads, f"vLLM, {options.dtype}")
    yield Role("genrm service", 1, 0.0, 0.0, 1, asked)


def _batch(config: Config) -> BatchPlan:
    prompts, samples, ranks = config.batch.prompts, config.batch.samples, config.learner.ranks
    minibatches, steps = config.algorithm.minibatches, config.steps
    longest = trajectory_tokens(config)
    a_minibatch = prompts * samples // minibatches
    a_rank = math.ceil(a_minibatch / ranks)
    # A micro-batch takes sequences while they fit, so it holds at least this many; a longer one gets its own.
    fit = max(1, config.learner.tokens_per_micro_batch // longest)
    return BatchPlan(
        prompts=prompts,
        samples=samples,
        sequences=prompts * samples,
        minibatches=minibatches,
        sequences_per_minibatch=a_minibatch,
        ranks=ranks,
        sequences_per_rank=a_rank,
        tokens_per_sequence=longest,
        tokens_per_rank=a_rank * longest,
        micro_batches=math.ceil(a_rank / fit),
        steps=steps,
        optimizer_steps=steps * minibatches,
        response_tokens=steps * prompts * samples * config.task.max_response_tokens,
    )


def _evaluation(config: Config) -> EvaluationPlan:
    asked = config.evaluation
    within = (config.steps - 1) // asked.every if asked.every else 0  # the one after the last step is counted below
    sequences = asked.problems * (asked.samples + (1 if asked.greedy else 0))
    return EvaluationPlan(2 + within, asked.problems, asked.samples, asked.greedy, sequences)


def _memory(config: Config, at: Placement, model: ModelFacts) -> tuple[tuple[str, str], ...]:
    rows: list[tuple[str, str]] = []
    if at.device == "gpu":
        crowd = f"{at.engines_per_gpu} engine(s) at " if at.gpu_shared else "an engine at "
        rows.append(("of a GPU, rollout", f"{crowd}{config.rollout.gpu_memory_share:.0%} (weights and KV cache)"))
        if judge_replicas(config):
            crowd = f"{at.judges_per_gpu} engine(s) at " if at.gpu_shared else "an engine at "
            rows.append(("of a GPU, judge", f"{crowd}{config.reward.genrm.gpu_memory_share:.0%}"))
        rows.append(
            ("of a GPU, learner", f"{at.learner_memory_share:.0%}" + (" left" if at.gpu_shared else ", its own"))
        )
    else:
        rows.append(("an engine's KV cache", f"{config.rollout.kv_cache_gib:g} GiB{_sequences_held(config)}"))
    rows.append(("a sequence's cache", _sequence(config)))
    if model.parameters:
        engine = model.parameters * DTYPE_BYTES[config.rollout.dtype]
        rows.append(("an engine's weights", _size(engine)))
        rows.append(("a learner rank's state", f"{_size(_rank_bytes(config, model.parameters))} and activations"))
    return tuple(rows)


def _sequences_held(config: Config) -> str:
    held = cache_size(config).held(config.rollout.kv_cache_gib)
    if held is None:
        return ""
    return f", holds {held:,} sequences of full length; {config.rollout.max_sequences:,} run at once at most"


def _sequence(config: Config) -> str:
    """Of the longest sequence: what is kept, its blocks, and how many more fit where one did in full."""
    size = cache_size(config)
    blocks = f"{size.blocks} blocks"
    if size.block_gib is not None:
        blocks += f", {_size(size.blocks * size.block_gib * 2**30)}"
    if config.kv.compressed:
        blocks += f"; {size.full_blocks} in full, so {size.full_blocks / size.blocks:.3g} x the sequences"
    return f"{describe(config)}: {blocks}"


def _rank_bytes(config: Config, parameters: int) -> int:
    """Parameters, gradients and optimizer state of a rank under its ZeRO stage; and the reference model, if any."""
    learner = config.learner
    width = DTYPE_BYTES[learner.dtype]
    optimizer = ADAM_BYTES + (MASTER_BYTES if width < 4 else 0)
    sharded = {0: 0, 1: optimizer, 2: optimizer + width, 3: optimizer + 2 * width}[learner.zero_stage]
    whole = optimizer + 2 * width - sharded
    reference = width if config.algorithm.options.get("beta") else 0
    return int(parameters * (whole + sharded / learner.ranks + reference))


def _written(config: Config) -> tuple[tuple[str, str], ...]:
    often = f"every {config.checkpoint.every} steps and at the end" if config.checkpoint.every else "at the end"
    rows = [
        ("config.yaml", "this configuration, composed"),
        ("manifest.json", "hashes, versions, seeds: what resume=auto checks"),
        ("metrics.jsonl", "one row a step; evaluations.jsonl and samples.jsonl beside it"),
        ("checkpoints/", f"{often}, the last {config.checkpoint.keep} kept"),
        ("best/", "the best checkpoint by held-out accuracy, as a Hugging Face folder"),
        ("model/", "the final weights, as a Hugging Face folder"),
        ("summary.json", "what the run came to, for machines; report.html for people"),
    ]
    if config.tracker.name == "wandb":
        rows.append(("wandb/", f"the W&B run, {config.tracker.mode}, project {config.tracker.project}"))
    return tuple(rows)


def _size(count: float) -> str:
    """Bytes for people: 6.3 MiB."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if count < 1024:
            return f"{count:.3g} {unit}"
        count /= 1024
    return f"{count:.3g} TiB"
