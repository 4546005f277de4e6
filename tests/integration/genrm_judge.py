"""A judge that needs no training: it reports what the model wrote. And a stand-in for an engine."""

import asyncio
import os

import numpy as np

from rltk.rewards.genrm.asking import as_verdict
from rltk.rewards.genrm.types import Prompt, Verdict
from rltk.rollout.engine import Completion


class Echo:
    name, version = "echo", "1"

    def __init__(self, max_tokens=24):
        self.max_tokens = max_tokens

    async def judge(self, question, ask):
        return await as_verdict(self._judge(question, ask))

    async def _judge(self, question, ask):
        reply = await ask(Prompt(({"role": "user", "content": question.response},), self.max_tokens))
        return Verdict(1.0, detail={"text": reply.text, "replica": reply.replica, "tokens": reply.tokens})


class Stand:
    """Answers as a JudgeEngine does, without an engine."""

    async def pid(self):
        return os.getpid()

    async def ready(self):
        return 0, 0

    async def stats(self):
        return {}

    async def stacks(self):
        return "a stand-in"

    async def complete(self, request, deadline_s):
        await asyncio.sleep(0.02)
        return Completion(request.uid, np.array([1]), np.array([0.0]), "stop", (0, 0))


class Word:
    """A chat of one word."""

    stop_ids = ()

    def encode(self, prompt):
        return [1]

    def decode(self, ids):
        return "yes"
