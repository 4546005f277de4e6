"""How judges ask: one retry where a reply holds no verdict, counts for the record, failures as typed results."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

from rltk.errors import ConfigError
from rltk.rewards.genrm.types import Ask, Comparison, JudgeUnavailable, Prompt, Reply, Verdict

Parsed = TypeVar("Parsed")
RETRY_TEMPERATURE = 0.6  # a greedy judge would only repeat itself

Messages = tuple[dict[str, str], ...]


@dataclass(frozen=True)
class Sampling:
    """How a judge's replies are sampled. Raises ConfigError naming the option that is out of range."""

    max_tokens: int = 4096
    temperature: float = 0.0
    seed: int = 0

    def __post_init__(self) -> None:
        if type(self.max_tokens) is not int or self.max_tokens < 1:
            raise ConfigError(f"judge: max_tokens={self.max_tokens!r} must be an integer of at least 1")
        if not isinstance(self.temperature, int | float) or not 0 <= self.temperature <= 2:
            raise ConfigError(f"judge: temperature={self.temperature!r} must be between 0 and 2")
        if type(self.seed) is not int or self.seed < 0:
            raise ConfigError(f"judge: seed={self.seed!r} must be an integer of at least 0")

    def __str__(self) -> str:
        return f"max_tokens={self.max_tokens},temperature={self.temperature:g},seed={self.seed}"

    def prompt(self, messages: Messages) -> Prompt:
        return Prompt(messages, self.max_tokens, self.temperature, self.seed)

    def retry(self) -> Sampling:
        return replace(self, temperature=self.temperature or RETRY_TEMPERATURE, seed=self.seed + 1)


@dataclass
class Interview:
    """All that one judging asks of the model, and what it cost."""

    ask: Ask
    sampling: Sampling
    counts: dict[str, int] = field(default_factory=lambda: {"replies": 0, "tokens": 0, "unfinished": 0})

    async def answer(self, messages: Messages, parse: Callable[[Reply], Parsed | None]) -> tuple[Parsed, Reply]:
        """The first of two replies that parses, and the reply. JudgeUnavailable (parse_fail) if neither does."""
        for sampling in (self.sampling, self.sampling.retry()):
            reply = await self.ask(sampling.prompt(messages))
            self.counts["replies"] += 1
            self.counts["tokens"] += reply.tokens
            self.counts["unfinished"] += reply.finish_reason == "length"
            parsed = parse(reply)
            if parsed is not None:
                return parsed, reply
        raise JudgeUnavailable("parse_fail", "two replies held no verdict")


async def both(first: Awaitable[Parsed], second: Awaitable[Parsed]) -> tuple[Parsed, Parsed]:
    """The two side by side; what one raises is raised when both have ended, so that nothing runs on unseen."""
    results = await asyncio.gather(first, second, return_exceptions=True)
    for result in results:
        if isinstance(result, BaseException):
            raise result
    return results[0], results[1]  # pyright: ignore[reportReturnType]


async def as_verdict(judging: Awaitable[Verdict]) -> Verdict:
    """The verdict with the seconds it took; one without a value where no reply could be had."""
    return await _timed(judging, lambda cause, detail: Verdict(None, cause=cause, detail=detail))


async def as_comparison(comparing: Awaitable[Comparison]) -> Comparison:
    return await _timed(comparing, lambda cause, detail: Comparison(None, cause=cause, detail=detail))


async def _timed(work: Awaitable[Any], failed: Callable[[str, dict[str, Any]], Any]) -> Any:
    start = time.perf_counter()
    try:
        result = await work
    except JudgeUnavailable as error:
        result = failed(error.cause, {"reason": str(error)})
    return replace(result, seconds=time.perf_counter() - start)
