"""A judge's replica that does as it is told, for tests of the service without an engine."""

import asyncio

from rltk.rewards.genrm.options import GenRMOptions
from rltk.rewards.genrm.replica import ReplicaGone
from rltk.rewards.genrm.types import JudgeUnavailable, Reply

SOUND, FLAWED = "All is right: \\boxed{-1}", "Paragraph 0 is wrong: \\boxed{0}"
QUICK = GenRMOptions(
    model="fake", deadline_s=20.0, attempt_s=10.0, max_sequences=4, breaker_failures=3, breaker_pause_s=0.05
)  # fmt: skip


class Fake:
    """`script`: what the next generations do, then `default`: a text, an exception, "hang", "gone", "ended" or a
    Reply-less object. `gate`: what they wait for first."""

    def __init__(self, name="a", script=(), default=SOUND, slots=4, gate=None):
        self.name, self.slots, self.script, self.default, self.gate = name, slots, list(script), default, gate
        self.prompts, self.uids = [], []
        self.running = self.most = self.cancelled = self.restarts = 0
        self.ours = True  # and can be restarted
        self.back = None  # an event: the process that ended stands again

    async def generate(self, prompt, deadline_s, uid):
        self.prompts.append(prompt)
        self.uids.append(uid)
        self.running += 1
        self.most = max(self.most, self.running)
        try:
            return await self._act(self.script.pop(0) if self.script else self.default)
        except asyncio.CancelledError:
            self.cancelled += 1
            raise
        finally:
            self.running -= 1

    async def _act(self, act):
        await asyncio.sleep(0)
        if self.gate is not None:
            await self.gate.wait()
        if isinstance(act, Exception):
            raise act
        if act == "hang":
            await asyncio.sleep(3600)
        if act == "gone":
            raise ConnectionError("the replica was killed")
        if act == "ended":
            raise ReplicaGone("the actor died")
        return Reply(act, "stop", len(act), self.name) if isinstance(act, str) else act

    async def ready(self):
        if isinstance(self.default, Exception):
            raise self.default

    async def returned(self):
        if self.back is not None:
            await self.back.wait()
        return True

    async def restart(self):
        self.restarts += 1
        if self.ours:
            self.script, self.default = [], SOUND
        return self.ours

    async def stacks(self):
        return f"{self.running} running"

    async def close(self):
        pass


REFUSED = JudgeUnavailable("too_long", "the prompt has 9 tokens and reward.genrm.context is 8")


async def until(condition):
    """Let others run until it holds; the test's own timeout bounds it."""
    while not condition():
        await asyncio.sleep(0.001)
