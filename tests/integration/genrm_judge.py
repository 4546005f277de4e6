"""A judge that needs no training: it reports what the model wrote. And a replica whose process can be stopped."""

import os

from rltk.rewards.genrm.asking import as_verdict
from rltk.rewards.genrm.engine import JudgeEngine
from rltk.rewards.genrm.types import Prompt, Verdict


class Echo:
    name, version = "echo", "1"

    def __init__(self, max_tokens=24):
        self.max_tokens = max_tokens

    async def judge(self, question, ask):
        return await as_verdict(self._judge(question, ask))

    async def _judge(self, question, ask):
        reply = await ask(Prompt(({"role": "user", "content": question.response},), self.max_tokens))
        return Verdict(1.0, detail={"text": reply.text, "replica": reply.replica, "tokens": reply.tokens})


class Stoppable(JudgeEngine):
    async def pid(self):
        return os.getpid()
