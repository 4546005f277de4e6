"""What a router knows of one replica, and what it asks of the thing behind it."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from typing import Protocol

from rltk.rewards.genrm.breaker import Breaker
from rltk.rewards.genrm.types import JudgeUnavailable, Prompt, Reply

FINAL = ("too_long", "refused")  # the prompt's own fault: every replica would say the same
MEMORY = 0.05  # of the share of unread replies: what one reply counts, so that about the last 20 do
SUSPECT = 0.5  # a share by so much over the best replica's is the replica's doing, not the questions'
STACKS_S = 4.0  # for a replica to say what it is doing; whoever asks for stacks gives up after 5 s (rltk/watch.py)


class ReplicaGone(JudgeUnavailable):
    """Its process ended. A new one takes questions in long before it can answer them: it gets none until then."""

    def __init__(self, message: str) -> None:
        super().__init__("unavailable", message)


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

    async def returned(self) -> bool:
        """After a ReplicaGone: True, when a new process has answered a prompt."""
        ...

    async def restart(self) -> bool:
        """True, when it has answered a prompt again; False, where the replica is not ours and nothing was done."""
        ...

    async def stacks(self) -> str: ...

    async def close(self) -> None: ...


@dataclass
class Replica:
    backend: Backend
    breaker: Breaker
    load: int = 0
    away: bool = False  # its process ended, or is being restarted
    answered: int = 0
    failed: int = 0
    unread: float = 0.0  # share of its late replies that were asked for again: whoever asked could not read them

    def answer(self) -> None:
        self.answered += 1
        self.unread *= 1 - MEMORY

    def asked_again(self) -> None:
        self.unread = min(1.0, self.unread + MEMORY)

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
    except ReplicaGone as error:
        raise ReplicaGone(f"{name}: {error}") from error
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
