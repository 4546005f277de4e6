"""Each key's own range: named values, lowest values. `rltk.checks` holds what takes two keys, a file or a device."""

from __future__ import annotations

import re
from collections.abc import Iterator
from functools import reduce
from typing import Any

from rltk.config import Config
from rltk.model_folder import DTYPE_BYTES
from rltk.nearest import meant
from rltk.rewards.genrm.options import ON_FAILURE
from rltk.rollout.tools.options import FORMATS, ISOLATIONS, MODES, SESSIONS, VOID_TURNS

CHOICES: dict[str, tuple[str, ...]] = {
    "rollout.dtype": tuple(DTYPE_BYTES),
    "learner.dtype": tuple(DTYPE_BYTES),
    "learner.schedule": ("constant", "linear", "cosine"),
    "learner.old": ("recompute", "detach"),
    "ratio.reference": ("old", "mu"),
    "cluster.device": ("auto", "cpu", "gpu"),
    "tracker.mode": ("offline", "online"),
    "tools.format": FORMATS,
    "tools.session": SESSIONS,
    "tools.void_turns": VOID_TURNS,
    "tools.jail.isolation": ISOLATIONS,
    "attc.mode": MODES,
    "dtsr.mode": MODES,
    "reward.genrm.dtype": tuple(DTYPE_BYTES),
    "reward.genrm.on_failure": ON_FAILURE,
    "resume": ("never", "auto"),
}
AT_LEAST_1 = [
    "steps",
    "batch.prompts",
    "batch.samples",
    "algorithm.minibatches",
    "rollout.engines",
    "rollout.workers",
    "rollout.max_sequences",
    "reward.workers",
    "reward.processes",
    "learner.ranks",
    "learner.tokens_per_micro_batch",
    "task.max_prompt_tokens",
    "task.max_response_tokens",
    "evaluation.problems",
    "evaluation.samples",
    "checkpoint.keep",
    "tools.max_calls",
    "tools.output_tokens",
    "tools.total_tokens",
    "tools.executors",
    "tools.slots",
    "tools.queue",
    "tools.jail.memory_mib",
    "tools.jail.output_kib",
    "tools.jail.wall_factor",
    "dtsr.max_checks",
    "dtsr.reply_tokens",
    "dtsr.threshold",
    "reward.genrm.replicas",
    "reward.genrm.context",
    "reward.genrm.max_sequences",
    "reward.genrm.queue",
    "reward.genrm.breaker_failures",
]
AT_LEAST_0 = [
    "seed",
    "batch.refills",
    "evaluation.every",
    "checkpoint.every",
    "learner.warmup_steps",
    "learner.weight_decay",
    "learner.threads",
    "rollout.threads",
    "kv.budget",
    "kv.sinks",
    "sync.probe_max",
    "sync.probe_mean",
    "pipeline.max_staleness",
    "tools.turn_tokens",
    "tools.jail.files_mib",
    "dtsr.gap_tokens",
    "reward.genrm.threads",
    "reward.genrm.retries",
    "reward.genrm.cache",
    "reward.genrm.canary_every",
]
ABOVE_0 = [
    "learner.lr",
    "learner.eps",
    "learner.max_grad_norm",
    "rollout.temperature",
    "rollout.kv_cache_gib",
    "reward.deadline_s",
    "reward.memory_gib",
    "deadlines.start",
    "deadlines.rollout",
    "deadlines.reward",
    "deadlines.learner",
    "deadlines.sync",
    "tools.call_deadline_s",
    "tools.deadline_s",
    "tools.jail.cpu_s",
    "attc.threshold",
    "reward.genrm.kv_cache_gib",
    "reward.genrm.deadline_s",
    "reward.genrm.attempt_s",
    "reward.genrm.start_s",
    "reward.genrm.breaker_pause_s",
]


def value_problems(config: Config) -> Iterator[str]:
    """Keys whose value is out of range by itself, each with the range."""
    for key, allowed in CHOICES.items():
        if (value := get(config, key)) not in allowed:
            yield f"{key} = {value!r} is not known{meant(value, allowed)}: set it to one of {', '.join(allowed)}"
    for key in AT_LEAST_1:
        if (value := get(config, key)) < 1:
            yield f"{key} = {value} must be at least 1"
    for key in AT_LEAST_0:
        if (value := get(config, key)) < 0:
            yield f"{key} = {value} must be at least 0"
    for key in ABOVE_0:
        if (value := get(config, key)) <= 0:
            yield f"{key} = {value} must be above 0"
    for key in ("learner.beta1", "learner.beta2"):
        if not 0 <= (value := get(config, key)) < 1:
            yield f"{key} = {value} must be at least 0 and under 1"
    for key, most in (("attc.threshold", 1), ("dtsr.threshold", 100)):
        if (value := get(config, key)) > most:
            yield f"{key} = {value} must be at most {most}"
    if config.learner.zero_stage not in range(4):
        yield f"learner.zero_stage = {config.learner.zero_stage} is not known: set it to 0, 1, 2 or 3"
    if config.pipeline.max_staleness > 0:
        yield (
            f"pipeline.max_staleness = {config.pipeline.max_staleness}: generation and training cannot overlap yet; "
            "set pipeline.max_staleness=0"
        )
    if not re.fullmatch(r"[A-Za-z0-9][\w.+-]*", config.name):
        yield f"name = {config.name!r} is no folder name: use letters, digits and . _ + - (where it goes is `output`)"


def get(config: Config, key: str) -> Any:
    """The value of a dotted key, as in `learner.lr`."""
    return reduce(getattr, key.split("."), config)
