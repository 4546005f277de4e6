"""The arithmetic of bench.kv_throughput: shapes, mixes of prompts, largest batches, predicted steps. Needs no torch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any

import numpy as np

from rltk.errors import ConfigError
from rltk.rollout.kv.options import KVOptions
from rltk.rollout.kv.settings import Settings

WARM = 8  # decode steps between the last prefill and the first that is timed
PROFILED = 8  # decode steps under the profiler, after those that are timed
SLACK = 16  # tokens that a request may sample beyond these: the scheduler runs ahead of what it has counted

# A step's work outside attention, for the prediction (an H200): weights are read at the copy bandwidth or multiplied at
# what its matrix units reach in layers of this size, whichever takes longer; the rest is what norms, rotary positions,
# activations and the sampler take.
MATMUL_FLOPS = 600e12
LAYER_SECONDS, SAMPLER_SECONDS = 40e-6, 0.5e-3


@dataclass(frozen=True)
class Shape:
    """A Qwen3 model, bf16, its output head apart from its embedding."""

    layers: int
    hidden: int
    q_heads: int
    kv_heads: int
    dim: int
    intermediate: int
    vocabulary: int  # small: a step's share of the output head and the sampler is the same in every arm

    @property
    def slot_bytes(self) -> int:
        """Of K and V of one token in one layer."""
        return self.kv_heads * 2 * self.dim * 2

    @property
    def parameters(self) -> int:
        """Those that a step reads: all but the embedding."""
        attention = self.hidden * self.dim * (2 * self.q_heads + 2 * self.kv_heads)
        return self.layers * (attention + 3 * self.hidden * self.intermediate) + self.hidden * self.vocabulary

    def config(self) -> dict[str, Any]:
        """Its config.json."""
        return {
            "architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3", "dtype": "bfloat16",
            "num_hidden_layers": self.layers, "hidden_size": self.hidden, "num_attention_heads": self.q_heads,
            "num_key_value_heads": self.kv_heads, "head_dim": self.dim, "intermediate_size": self.intermediate,
            "vocab_size": self.vocabulary, "tie_word_embeddings": False, "max_position_embeddings": 40960,
            "rope_theta": 1_000_000.0, "rms_norm_eps": 1e-6, "hidden_act": "silu", "attention_bias": False,
            "bos_token_id": 1, "eos_token_id": 2,
        }  # fmt: skip


@dataclass(frozen=True)
class Scale:
    """What is run. Prompts are `shortest` to `longest` tokens in the stationary mix, `whole` at a group's end."""

    shape: Shape
    shortest: int
    longest: int
    whole: int
    context: int
    batched_tokens: int  # of one engine step
    small: int  # the batch that is reported beside the largest
    steps: int  # timed
    block_size: int  # of vLLM's own caches
    compressed_block_size: int

    def lengths(self, mix: str, count: int) -> list[int]:
        """Of `count` prompts, longest first. The stationary mix takes the quantiles of the uniform distribution, so
        that chance does not decide which arm has the longer prompts."""
        if mix == "group_end":
            return [self.whole] * count
        return [round(self.longest - (self.longest - self.shortest) * (i + 0.5) / count) for i in range(count)]


H200 = Scale(
    Shape(28, 2048, 16, 8, 128, 6144, 32000), shortest=512, longest=16896, whole=16384, context=17920,
    batched_tokens=35840, small=64, steps=256, block_size=16, compressed_block_size=64,
)  # fmt: skip
SMOKE = Scale(
    Shape(2, 64, 4, 2, 32, 128, 512), shortest=16, longest=128, whole=128, context=256,
    batched_tokens=512, small=4, steps=16, block_size=32, compressed_block_size=32,
)  # fmt: skip


@dataclass(frozen=True)
class Arm:
    """A cache: `full`, `fp8` or `policy:budget`, on one scale."""

    name: str
    scale: Scale

    @cached_property
    def options(self) -> KVOptions:
        """Raises ConfigError for what is no cache."""
        name, _, budget = self.name.partition(":")
        if not name or (budget and not budget.isdigit()):
            raise ConfigError(
                f"{self.name!r} names no cache. Fix: full, fp8, or a policy and its budget: longflow:1800"
            )
        options = KVOptions(name, budget=float(budget or 0))
        if budget and not options.compressed:
            raise ConfigError(f"{self.name!r}: {name} takes no budget")
        return options

    @cached_property
    def settings(self) -> Settings | None:
        """None of vLLM's own caches. Raises ConfigError for a policy or a budget that there is not."""
        return Settings(self.options, self.scale.context) if self.options.compressed else None

    @property
    def block_size(self) -> int:
        return self.scale.compressed_block_size if self.options.compressed else self.scale.block_size

    @property
    def slot_bytes(self) -> int:
        return self.scale.shape.slot_bytes // (2 if self.options.name == "fp8" else 1)

    def slots(self, prompt: int, sampled: int) -> int:
        """That a sequence holds when it has sampled so many tokens; the last one has no key yet."""
        return prompt + sampled if self.settings is None else self.settings.slots(prompt, sampled)

    def usable_blocks(self, kv_bytes: int) -> int:
        """vLLM keeps one for nobody."""
        return kv_bytes // (self.slot_bytes * self.block_size) // self.scale.shape.layers - 1


@dataclass(frozen=True)
class Batch:
    """Sequences that run together. drift: tokens that each has sampled when the last prompt is in; responses: the most
    that each may sample."""

    prompts: list[int]
    drift: list[int]
    prefill_steps: int
    responses: list[int]

    @classmethod
    def of(cls, arm: Arm, mix: str, count: int) -> Batch:
        scale = arm.scale
        prompts = scale.lengths(mix, count)
        at = admitted(prompts, scale.batched_tokens, chunked=not arm.options.compressed)
        drift = [at[-1] - step + 1 for step in at]
        longest = WARM + scale.steps + PROFILED + SLACK
        return cls(prompts, drift, at[-1], [sampled + longest for sampled in drift])

    def blocks(self, arm: Arm) -> int:
        """At the end of it."""
        pairs = zip(self.prompts, self.responses, strict=True)
        return sum(-(-arm.slots(prompt, most) // arm.block_size) for prompt, most in pairs)

    def slots(self, arm: Arm) -> int:
        """All sequences', in the middle of the timed steps."""
        done = WARM + arm.scale.steps // 2
        return sum(arm.slots(p, sampled + done) for p, sampled in zip(self.prompts, self.drift, strict=True))


def admitted(prompts: Sequence[int], budget: int, chunked: bool) -> list[int]:
    """The engine step that each prompt is done in, the first being 1: vLLM gives every running sequence a token, then
    takes prompts in order, whole ones or parts, until the step has `budget` tokens. Raises ValueError if one never
    fits."""
    done: list[int] = []
    step, part = 0, 0
    while len(done) < len(prompts):
        step += 1
        room = budget - len(done)
        if room <= 0 or (not chunked and prompts[len(done)] > room):
            raise ValueError(f"a prompt of {prompts[len(done)]} tokens finds no room in a step of {budget}")
        while len(done) < len(prompts) and room:
            rest = prompts[len(done)] - part
            if rest <= room:
                done.append(step)
                room, part = room - rest, 0
            elif chunked:
                room, part = 0, part + room
            else:
                break
    return done


def largest_batch(arm: Arm, mix: str, kv_bytes: int) -> Batch:
    """The most sequences whose blocks, at the end of what is timed, fit the pool: none of them is ever preempted."""
    usable = arm.usable_blocks(kv_bytes)

    def fits(count: int) -> bool:
        return Batch.of(arm, mix, count).blocks(arm) <= usable

    if not fits(1):
        raise ConfigError(f"{usable} blocks of {arm.block_size} tokens do not hold one sequence of {arm.name}")
    low, high = 1, 2
    while fits(high):
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return Batch.of(arm, mix, low)


@dataclass(frozen=True)
class Predicted:
    """Seconds of one decode step."""

    attention: float
    weights: float
    rest: float

    @property
    def step(self) -> float:
        return self.attention + self.weights + self.rest

    def to_dict(self) -> dict[str, float]:
        return {f"{name}_ms": 1e3 * seconds for name, seconds in {**asdict(self), "step": self.step}.items()}


def predict(arm: Arm, sequences: int, slots: int, kernel: dict[str, Any]) -> Predicted:
    """A step of `sequences` that hold `slots` in all; kernel: the figures of bench.longflow_kernel.

    Attention of a layer: a latency and a time a slot, fitted to its four cells. An fp8 slot is taken for half a bf16
    slot of FlashAttention 3.
    """
    shape, cells = arm.scale.shape, kernel["cells"]
    held = np.array([cell["batch"] * cell["slots"] for cell in cells], float)
    seconds = 1e-6 * np.array([cell["us"]["shared" if arm.options.compressed else "fa3"] for cell in cells])
    slope, latency = np.polyfit(held, seconds, 1, w=1 / seconds)
    layer = max(latency, 0) + slope * slots * arm.slot_bytes / shape.slot_bytes
    read = 2 * shape.parameters / (1e9 * kernel["copy_gb_per_s"])
    multiplied = 2 * shape.parameters * sequences / MATMUL_FLOPS
    rest = shape.layers * LAYER_SECONDS + SAMPLER_SECONDS
    return Predicted(float(shape.layers * layer), max(read, multiplied), rest)
