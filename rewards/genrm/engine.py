"""One replica of a judge of our own: the rollout engine's actor, and a plain call for one reply."""

from __future__ import annotations

import asyncio
from contextlib import aclosing
from typing import Any

from rltk.rewards.genrm.options import GenRMOptions
from rltk.rollout.actor import EngineActor
from rltk.rollout.engine import Completion, EngineOptions, Request


class JudgeEngine(EngineActor):
    """`ray.remote` is applied where it is placed, with `max_restarts=-1` (its weights never change, so that a new start
    is the same engine) and `max_concurrency=concurrency(options)`."""

    async def complete(self, request: Request, deadline_s: float) -> Completion:
        """The whole reply at once: no stream, which costs both sides more than a short verdict does. Cancelled or past
        its deadline (TimeoutError) it leaves the engine."""
        stream: Any = self.generate([request])
        async with asyncio.timeout(deadline_s), aclosing(stream):
            async for batch in stream:
                return batch[0]
        raise AssertionError("unreachable: a stream gives what was asked, or raises")


def replica_options(options: GenRMOptions, device: str, threads: int = 0, seed: int = 0) -> EngineOptions:
    """device: cpu | gpu."""
    return EngineOptions(
        model=options.model,
        dtype=options.dtype,
        context=options.context,
        device=device,
        max_sequences=options.max_sequences,
        kv_cache_gib=options.kv_cache_gib,
        gpu_memory_share=options.gpu_memory_share,
        enforce_eager=options.enforce_eager,
        threads=options.threads or threads,
        seed=seed,
    )


def concurrency(options: GenRMOptions) -> int:
    """Calls that Ray must let into one replica: twice its sequences, as abandoned ones end late, and questions after
    its state."""
    return 2 * options.max_sequences + 64
