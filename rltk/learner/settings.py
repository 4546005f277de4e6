"""What a learner rank is told, and what it gives back. Plain data, so that it travels between processes."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np

from rltk.config import Config


@dataclass(frozen=True)
class LearnerSettings:
    """Everything about learning that a rank needs; made once from the run's Config."""

    model: str
    device: str  # cpu | gpu
    algorithm: str  # a module of algorithms/, or module:Class
    algorithm_options: dict[str, Any]
    correction: str
    correction_options: dict[str, Any]
    reference: str  # old | mu
    minibatches: int
    temperature: float
    max_response_tokens: int
    seed: int
    zero_stage: int = 1
    dtype: str = "float32"
    lr: float = 1e-4
    schedule: str = "constant"
    total_steps: int = 1  # optimizer steps of the run; only decaying schedules read it
    warmup_steps: int = 0
    beta1: float = 0.9
    beta2: float = 0.98
    eps: float = 1e-8
    weight_decay: float = 0.0
    max_grad_norm: float = 1.0
    tokens_per_micro_batch: int = 8192
    gradient_checkpointing: bool = False
    old: str = "recompute"
    threads: int = 0
    head_chunk: int = 2048  # tokens whose logits exist at once


def learner_settings(config: Config, device: str, threads: int) -> LearnerSettings:
    learner = config.learner
    names = (
        "zero_stage", "dtype", "lr", "schedule", "warmup_steps", "beta1", "beta2", "eps", "weight_decay",
        "max_grad_norm", "tokens_per_micro_batch", "gradient_checkpointing", "old",
    )  # fmt: skip
    return LearnerSettings(
        model=config.model.path,
        device=device,
        algorithm=config.algorithm.path or config.algorithm.name,
        algorithm_options=dict(config.algorithm.options),
        correction=config.correction,
        correction_options=dict(config.correction_options),
        reference=config.ratio.reference,
        minibatches=config.algorithm.minibatches,
        temperature=config.rollout.temperature,
        max_response_tokens=config.task.max_response_tokens,
        seed=config.seed,
        total_steps=config.steps * config.algorithm.minibatches,
        threads=threads,
        **{name: getattr(learner, name) for name in names},
    )


@dataclass(frozen=True)
class TrainResult:
    """One training step, merged over ranks.

    `metrics`: averages over the step's optimizer steps. `old`, `new`, `entropy`: per sequence of the batch (in its
    order; None where the sequence was left out), float32 over its sampled tokens; `new` and `entropy` (in nats) as its
    minibatch saw them. `reference` is what the objective takes ratios against: `old`, or `mu`, the sampler; `old` is
    then known of the first minibatch only, whose `new` it is, and stays None elsewhere.
    """

    metrics: dict[str, float]
    old: list[np.ndarray | None]
    new: list[np.ndarray | None]
    entropy: list[np.ndarray | None]
    trained: list[int]  # sequence numbers that were learned from
    tokens: int  # tokens through the model in training passes, prompts included
    seconds: dict[str, float] = field(default_factory=dict)  # logprobs, train
    reference: str = "old"  # old | mu
