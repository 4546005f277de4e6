"""How much of a sequence an engine's KV cache holds: slots, blocks, GiB. No torch, no Ray."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

from rltk.config import Config
from rltk.devices import device
from rltk.model_folder import DTYPE_BYTES, facts
from rltk.rollout.dtsr import QUESTION_TOKENS
from rltk.rollout.kv import Settings

PROBE_TOKENS = 1  # the weight probe scores a sequence by sampling one token more
QUESTION = "dtsr's question and reply"
BLOCK_TOKENS = {"cpu": 32, "gpu": 16}  # of vLLM's caches, as the engines are started


@dataclass(frozen=True)
class CacheSize:
    """Of the longest sequence a run may have."""

    tokens: int  # all that `lengths` names
    slots: int  # that it holds at most
    blocks: int
    full_blocks: int  # without compression
    block_gib: float | None  # None: config.json does not say

    def gib(self, sequences: int) -> float | None:
        """What so many sequences take. vLLM keeps one block for itself."""
        return None if self.block_gib is None else (sequences * self.blocks + 1) * self.block_gib

    def held(self, gib: float) -> int | None:
        """Sequences that fit into a cache of `gib`."""
        return None if self.block_gib is None else max(0, math.floor(gib / self.block_gib) - 1) // self.blocks


def lengths(config: Config) -> dict[str, int]:
    """What the longest sequence is made of, in tokens, by the keys that say so."""
    task, tools, dtsr = config.task, config.tools, config.dtsr
    parts = {"task.max_prompt_tokens": task.max_prompt_tokens, "task.max_response_tokens": task.max_response_tokens}
    if tools.enabled:
        parts["tools.total_tokens"] = tools.total_tokens
    if dtsr.mode != "off":  # it is asked about the problem and all that was thought
        parts[QUESTION] = QUESTION_TOKENS + dtsr.reply_tokens
    return parts


def trajectory_tokens(config: Config) -> int:
    """The longest trajectory: what is learned from. (The mark that closes a thought is some tokens more.)"""
    return sum(tokens for key, tokens in lengths(config).items() if key != QUESTION)


def context(config: Config) -> int:
    """The engine's longest sequence, in tokens."""
    return sum(lengths(config).values()) + PROBE_TOKENS


def block_tokens(config: Config) -> int:
    return BLOCK_TOKENS[device(config.cluster)]


# What follows is of a `kv` that is known to be sound.


def of_the_prompt(config: Config) -> bool:
    """The policy compresses prompts alone, and keeps what decoding appends."""
    return config.kv.compressed and not Settings(config.kv, context(config)).policy.evicts


def most_kept(config: Config) -> int:
    """kv.budget in tokens, for the longest prompt of the run where it is a share of the prompt."""
    return config.kv.slots(config.task.max_prompt_tokens if of_the_prompt(config) else context(config))


def cache_size(config: Config) -> CacheSize:
    prompt, block = config.task.max_prompt_tokens, block_tokens(config)
    slots = tokens = context(config) - PROBE_TOKENS
    if config.kv.compressed:
        slots = Settings(config.kv, context(config)).slots(prompt, tokens - prompt)
    values = facts(Path(config.model.path)).kv_values
    bytes_a_value = 1 if config.kv.name == "fp8" else DTYPE_BYTES[config.rollout.dtype]
    return CacheSize(
        tokens=tokens,
        slots=slots,
        blocks=math.ceil(slots / block),
        full_blocks=math.ceil(tokens / block),
        block_gib=None if values is None else values * bytes_a_value * block / 2**30,
    )


def describe(config: Config) -> str:
    """For people: `longflow, 51 slots a sequence of up to 256 tokens (0.2 of it), heads shared, 4 sinks`."""
    kv = config.kv
    if not kv.compressed:
        return "fp8, every token in 8 bits" if kv.name == "fp8" else kv.name
    prompt_only = of_the_prompt(config)
    if prompt_only:
        what = f"{most_kept(config)} slots of a prompt of up to {config.task.max_prompt_tokens} tokens"
    else:
        what = f"{most_kept(config)} slots a sequence of up to {cache_size(config).tokens} tokens"
    share = f" ({kv.budget:.3g} of it)" if kv.budget < 1 else ""
    response = " and all of the response" if prompt_only else ""
    return f"{kv.name}, {what}{share}{response}, heads {kv.heads}, {kv.sinks} sinks"
