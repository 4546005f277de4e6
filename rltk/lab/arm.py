"""What a lab run is told: an arm is one run, a stack is runs of one shape side by side."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from rltk.algorithms import Objective, build_correction, build_objective
from rltk.rollout.kv.options import KVOptions


@dataclass(frozen=True)
class Arm:
    """One run: an objective, its correction, how stale its samples are, and its seed."""

    name: str
    algorithm: str  # a module of algorithms/, or module:Class
    options: dict[str, Any] = field(default_factory=dict)
    correction: str = "none"
    correction_options: dict[str, Any] = field(default_factory=dict)
    reference: str = "old"  # old | mu
    staleness: int = 0  # weight versions between the sampler and the learner
    seed: int = 0
    # Of the labels that it learns from: shares of flawed right answers that pass, of sound ones that are called flawed.
    label_miss: float = 0.0
    label_alarm: float = 0.0

    def objective(self) -> Objective:
        correction = build_correction(self.correction, **self.correction_options)
        return build_objective(self.algorithm, correction=correction, **{"reference": self.reference, **self.options})


@dataclass(frozen=True)
class Settings:
    """What the arms of a stack have in common. Names and units are those of rltk.train's configuration."""

    model: str  # a folder
    steps: int = 25
    minibatches: int = 4
    prompts: int = 16
    samples: int = 8
    lr: float = 1.0e-4
    beta1: float = 0.9
    beta2: float = 0.98
    eps: float = 1.0e-8
    weight_decay: float = 0.0
    max_grad_norm: float = 1.0
    temperature: float = 1.0
    kv: KVOptions = field(default_factory=KVOptions)  # what the sampler's cache keeps
    kv_bits: int = 16  # of the sampler's cache: 16 exact, under it quantised
    problems: int = 64  # held out
    eval_samples: int = 4
    evaluate_every: int = 0  # training steps; 0: before and after only
    noise_every: int = 0  # training steps between two measurements of the gradient's noise; 0: never
    tokens_per_pass: int = 100_000  # padded tokens through the models at once; bounds memory only
    device: str = "cpu"
