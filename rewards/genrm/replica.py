"""What a router knows of one replica, and what it asks of the thing behind it."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from typing import Protocol

from rltk.rewards.genrm.breaker import Breaker
from rltk.rewards.genrm.types import JudgeUnavailable, Prompt, Reply

FINAL = ("too_long", "refused")  # the prompt's own fault: every replica would say the same
STACKS_S = 4.0  # for a replica to say what it is doing; whoever asks for stacks gives up after 5 s (rltk/watch.py)


class Backend(Protocol):
    """One replica. `slots`: generations it is given at once."""

    name: str
    slots: int

    async def ready(self) -> None:
        """Raises InfrastructureError or ConfigError saying what stands in the way."""
        ...

    async def generate(self, prompt: Prompt, deadline_s: float, uid: str) -> Reply:
        """Raises JudgeUnavailable; whatever else it raises counts as one. Cancelled, it stops the work over there."""
        ...

    async def restart(self) -> None:
        """Returns when it answers again. May do nothing, where the replica is not ours."""
        ...

    async def stacks(self) -> str: ...

    async def close(self) -> None: ...


@dataclass
class Replica:
    backend: Backend
    breaker: Breaker
    load: int = 0
    away: bool = False  # being restarted
    answered: int = 0
    failed: int = 0

    @property
    def usable(self) -> bool:
        return not self.away and self.breaker.allows()

    @property
    def resting(self) -> bool:
        """Nobody is let in for a while."""
        return self.away or self.breaker.state == "open"

    @property
    def state(self) -> str:
        """closed | open | half_open | away"""
        return "away" if self.away else self.breaker.state

    def refusal(self) -> JudgeUnavailable:
        return JudgeUnavailable("unavailable", f"{self.backend.name} fails, and is not asked at the moment")


def result(work: asyncio.Future[Reply], name: str) -> Reply:
    """The reply of a generation that ended. Raises JudgeUnavailable if it is none."""
    try:
        reply = work.result()
    except JudgeUnavailable as error:
        raise JudgeUnavailable(error.cause, f"{name}: {error}") from error
    except asyncio.CancelledError:
        raise JudgeUnavailable("unavailable", f"{name} gave the prompt up") from None
    except Exception as error:
        raise JudgeUnavailable("unavailable", f"{name}: {type(error).__name__}: {str(error)[:500]}") from error
    if not isinstance(reply, Reply) or not isinstance(reply.text, str):
        raise JudgeUnavailable("garbage", f"{name} gave {type(reply).__name__} in place of a reply")
    return reply


async def stacks(backend: Backend) -> str:
    try:
        async with asyncio.timeout(STACKS_S):
            return f"judge {backend.name}: {await backend.stacks()}"
    except Exception as error:  # dead or stuck: that is itself the news
        return f"judge {backend.name} did not answer with its stacks: {error!r}"
