"""Session: one question's way to the judge model, through a router.

Its deadline covers waiting, retries and every turn. What a judge asks for again word for word (it could not read the
reply) goes to another replica too, so that one which writes garbage costs a retry and no verdict; and the router hears
of it: such a one is asked only where no other has a place.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

from rltk.rewards.genrm.types import Prompt, Reply

if TYPE_CHECKING:
    from rltk.rewards.genrm.router import Router


class Session:
    """`ask` is what a judge speaks with. `number`: its age among the router's; `only`: the one replica it may ask."""

    def __init__(self, router: Router, number: int, uid: str, deadline: float, only: str | None) -> None:
        self._router = router
        self.number, self.uid, self.only = number, uid, only
        self.begun = False  # it has passed the queue's bound
        self._deadline = deadline
        self._answered: dict[str, list[str]] = {}  # by whom, for each chat that was asked

    @property
    def left(self) -> float:
        """Seconds to the deadline."""
        return self._deadline - time.monotonic()

    async def ask(self, prompt: Prompt) -> Reply:
        """The model's reply. Raises JudgeUnavailable: timeout, unavailable, queue_full, too_long, refused, garbage."""
        answered = self._answered.setdefault(repr(prompt.messages), [])
        if answered:
            self._router.asked_again(answered[-1])
        reply = await self._router.generate(self, prompt, answered)
        answered.append(reply.replica)
        return reply
