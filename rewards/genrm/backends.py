"""The two kinds of replicas a router speaks to: engines of our own, and OpenAI-compatible servers."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import secrets
from collections.abc import Callable
from typing import Any
from urllib.parse import quote, urlsplit

import aiohttp
import ray
from ray.exceptions import RayActorError, RayError

from rltk import watch
from rltk.errors import ConfigError, InfrastructureError
from rltk.rewards.genrm.options import GenRMOptions
from rltk.rewards.genrm.process import Process, end, process_of
from rltk.rewards.genrm.replica import ReplicaGone
from rltk.rewards.genrm.types import JudgeUnavailable, Prompt, Reply
from rltk.rollout.engine import Request
from rltk.rollout.new_text import NewText
from rltk.rollout.tokens import decode, load_tokenizer, render, stop_ids

KEY = "reward.genrm"  # of the config
ALIVE_S = 20.0  # for a replica to say that it lives; Ray may just be starting its process anew
READY_S = 5.0  # for one that lives to say whether it can work
ORPHAN_S = 10.0  # past a generation's deadline: the replica ends it even if nobody tells it to
LARGEST_ANSWER = 1 << 24  # bytes of an HTTP answer
HELLO = Prompt(({"role": "user", "content": "Say yes."},), max_tokens=8)


class Chat:
    """Prompts as ids for one model's tokenizer. What they quote brings no special token along: a candidate's
    `<|im_end|>` would end the judge's instructions and begin its own. Where the model's template knows no system role
    (Gemma's refuses it, others leave it out), the judge's instructions begin the user's message."""

    def __init__(self, options: GenRMOptions) -> None:
        self._tokenizer = load_tokenizer(options.model, options.chat_template, KEY)
        self._text = NewText(self._tokenizer)
        self.stop_ids = tuple(stop_ids(self._tokenizer, options.model))
        self._has_system = _shows_system(self._tokenizer)

    def encode(self, prompt: Prompt) -> list[int]:
        messages = tuple({**message, "content": self._text.escape(message["content"])} for message in prompt.messages)
        if not self._has_system and len(messages) > 1 and messages[0]["role"] == "system":
            system, user, *later = messages
            messages = ({**user, "content": f"{system['content']}\n\n{user['content']}"}, *later)
        text = render(self._tokenizer, messages, more=True, key=KEY)
        return self._tokenizer.encode(text, add_special_tokens=False)

    def decode(self, ids: Any) -> str:
        return decode(self._tokenizer, ids, special=False)


def _shows_system(tokenizer: Any) -> bool:
    try:
        text = render(
            tokenizer, ({"role": "system", "content": "rubric"}, {"role": "user", "content": "yes"}), more=True
        )
    except ConfigError:  # the template refuses
        return False
    return "rubric" in text


class EngineBackend:
    """A JudgeEngine actor. `chat` may be shared among the replicas of one model."""

    def __init__(self, name: str, handle: Any, chat: Chat, options: GenRMOptions) -> None:
        self.name, self.slots = name, options.max_sequences
        self._handle, self._chat, self._context = handle, chat, options.context
        self._start_s = options.start_s
        self._process: Process | None = None  # the last that answered
        self._meeting: asyncio.Task[None] | None = None

    async def ready(self) -> None:
        await watch.wait(
            self._handle.ready.remote(), "start", "genrm service", f"judge {self.name}", self._start_s,
            peek=lambda: self._handle.stacks.remote(),
        )  # fmt: skip
        await self._meet()

    async def _meet(self) -> None:
        """Ask which process it is, so that it can be ended where it stands still."""
        told = process_of(self._handle)
        self._process = await watch.wait(told, "tell its process", "genrm service", f"judge {self.name}", self._start_s)

    async def generate(self, prompt: Prompt, deadline_s: float, uid: str) -> Reply:
        try:
            ids = self._chat.encode(prompt)
        except Exception as error:  # some templates take no system message, or want turns in another order
            raise JudgeUnavailable("refused", f"no prompt can be made: {error}") from error
        room = self._context - len(ids)
        if room < 1:
            words = f"the prompt has {len(ids)} tokens and reward.genrm.context is {self._context}"
            raise JudgeUnavailable("too_long", words)
        request = Request(
            uid, ids, min(prompt.max_tokens, room), prompt.temperature, prompt.seed, self._chat.stop_ids, logprobs=False
        )  # fmt: skip
        reference = self._handle.complete.remote(request, deadline_s + ORPHAN_S)
        ended = False
        try:
            completion = await reference
            ended = True
        except RayActorError as error:
            ended = True
            raise ReplicaGone(f"{type(error).__name__}: {str(error)[-500:]}") from error
        except RayError as error:
            ended = True
            raise JudgeUnavailable("unavailable", f"{type(error).__name__}: {str(error)[-500:]}") from error
        finally:
            if not ended:  # whoever asked has gone: the engine stops too
                ray.cancel(reference)
        if self._process is None and self._meeting is None:  # a service that Ray started anew calls no `ready`
            self._meeting = asyncio.ensure_future(self._meet())
            self._meeting.add_done_callback(_gone_again)
        if completion.finish_reason not in ("stop", "length"):
            raise JudgeUnavailable("unavailable", f"the engine ended it with {completion.finish_reason!r}")
        if completion.finish_reason == "length" and room < prompt.max_tokens:
            words = f"the prompt has {len(ids)} tokens and leaves {room} of reward.genrm.context = {self._context}"
            raise JudgeUnavailable("too_long", f"{words} for a reply, which may have {prompt.max_tokens}: it was cut")
        text = self._chat.decode(completion.ids.tolist())
        return Reply(text, completion.finish_reason, len(completion.ids), self.name)

    async def returned(self) -> bool:
        """An engine's first prompt may take it longer than a question has, so that it is none's."""
        await self._answer(self._handle.ready.remote)
        await self._meet()
        await self.generate(HELLO, self._start_s, f"hello.{secrets.token_hex(3)}")
        return True

    async def restart(self) -> bool:
        """End the actor, unless it is just coming up; Ray starts it anew (max_restarts=-1)."""
        if not await self._coming_up():
            await self._end()
        return await self.returned()

    async def _end(self) -> None:
        if self._process is None or not await end(self._process):
            ray.kill(self._handle, no_restart=False)  # a process that nobody has met; it answers

    async def _coming_up(self) -> bool:
        """A process that Ray starts anew answers before long, one that is stuck never; until then they look alike."""
        try:
            async with asyncio.timeout(ALIVE_S):
                await self._answer(self._handle.stats.remote)
        except TimeoutError:
            return False
        try:
            async with asyncio.timeout(READY_S):
                await self._handle.ready.remote()
        except TimeoutError:
            return True  # it loads its weights
        except RayError:
            return False  # it could not
        return False  # it stands, and fails at what it is asked

    async def _answer(self, call: Callable[[], Any]) -> None:
        """Until it answers. A call that was on its way to a process as that was killed may never be heard of again."""
        while True:
            with contextlib.suppress(RayActorError, TimeoutError):  # not there yet
                async with asyncio.timeout(READY_S):
                    await call()
                return
            await asyncio.sleep(1.0)

    async def stacks(self) -> str:
        return await self._handle.stacks.remote()

    async def close(self) -> None:
        """Engines are ended by whoever placed them."""
        if self._meeting is not None:
            self._meeting.cancel()


def _gone_again(meeting: asyncio.Task[None]) -> None:
    """Hears what kept it from its process: the next one is met in `returned`."""
    if not meeting.cancelled():
        meeting.exception()


class OpenAIBackend:
    """Any server with `POST <url>/chat/completions` as OpenAI's API reference describes it (vLLM, SGLang, llama.cpp,
    Ollama and hosted services have it). Belongs to one event loop."""

    def __init__(self, options: GenRMOptions) -> None:
        self.name, self.slots = server(options.url), options.max_sequences
        self._url = f"{str(options.url).rstrip('/')}/chat/completions"
        self._model, self._start_s = options.model, options.start_s
        key = os.environ.get(options.key_env, "")
        self._headers = {"Authorization": f"Bearer {key}"} if key else {}
        self._key_env = options.key_env
        self._session: aiohttp.ClientSession | None = None

    async def ready(self) -> None:
        try:
            async with asyncio.timeout(self._start_s):
                await self.generate(HELLO, self._start_s, "ready")
        except (TimeoutError, InfrastructureError, aiohttp.ClientError, OSError) as error:
            await self.close()
            raise InfrastructureError(
                f"the judge's server {self.name} (reward.genrm.url) did not answer a test prompt for model "
                f"{self._model!r}: {str(error) or type(error).__name__}"
            ) from error

    async def generate(self, prompt: Prompt, deadline_s: float, uid: str) -> Reply:
        """The deadline is kept by the caller: cancelled, the connection closes, which is how such a server hears of
        it."""
        question = {
            "model": self._model,
            "messages": list(prompt.messages),
            "max_tokens": prompt.max_tokens,
            "temperature": prompt.temperature,
            "seed": prompt.seed,
        }
        try:
            status, body = await self._post(question, uid)
        except (aiohttp.ClientError, OSError) as error:
            raise JudgeUnavailable("unavailable", f"{type(error).__name__}: {error}") from error
        if status != 200:
            raise self._refusal(status, body)
        return self._read(body)

    async def returned(self) -> bool:
        return False

    async def restart(self) -> bool:
        """The server is not ours."""
        return False

    async def stacks(self) -> str:
        return "a server elsewhere, which shows no stacks"

    async def close(self) -> None:
        if self._session is not None:
            await self._session.close()
            self._session = None

    async def _post(self, question: dict[str, Any], uid: str) -> tuple[int, bytes]:
        if self._session is None:
            connector = aiohttp.TCPConnector(limit=self.slots)
            no_timeout = aiohttp.ClientTimeout(total=None)  # the router's deadline is the only one
            self._session = aiohttp.ClientSession(connector=connector, timeout=no_timeout, headers=self._headers)
        headers = {"X-Request-Id": quote(uid)}
        async with self._session.post(self._url, json=question, headers=headers) as response:
            body = bytearray()
            async for part in response.content.iter_chunked(65536):
                body += part
                if len(body) > LARGEST_ANSWER:
                    raise JudgeUnavailable("garbage", f"an answer of over {LARGEST_ANSWER} bytes")
            return response.status, bytes(body)

    def _refusal(self, status: int, body: bytes) -> JudgeUnavailable:
        words = f"HTTP status {status}: {body[:200].decode(errors='replace')!r}"
        if status in (401, 403):
            return JudgeUnavailable("refused", f"{words}; is the key in {self._key_env} (reward.genrm.key_env) right?")
        if status in (408, 425, 429) or status >= 500:
            return JudgeUnavailable("unavailable", words)
        return JudgeUnavailable("refused", words)

    def _read(self, body: bytes) -> Reply:
        try:
            answer = json.loads(body)
            choice = answer["choices"][0]
            text, reason = choice["message"]["content"], choice["finish_reason"]
            if text is None and reason == "length":
                text = ""  # it was still thinking, and the server keeps thoughts apart
            if not isinstance(text, str) or not isinstance(reason, str):
                raise TypeError(f"content is {type(text).__name__}, finish_reason {type(reason).__name__}")
            tokens = (answer.get("usage") or {}).get("completion_tokens")
        except (ValueError, TypeError, KeyError, IndexError, AttributeError, RecursionError) as error:
            raise JudgeUnavailable("garbage", f"not a chat completion: {error!r}: {body[:80]!r}") from error
        return Reply(text, reason, tokens if isinstance(tokens, int) else 0, self.name)


def server(url: str | None) -> str:
    """The server as it is shown: without path and credentials."""
    with contextlib.suppress(ValueError):  # of a port that is no number
        parts = urlsplit(url or "")
        if parts.scheme in ("http", "https") and parts.hostname:
            return f"{parts.scheme}://{parts.hostname}" + (f":{parts.port}" if parts.port else "")
    raise ConfigError(
        f"reward.genrm.url is no server's address (not shown, {len(url or '')} characters): give it as "
        "http://host:8000/v1 (it is asked at <url>/chat/completions)"
    )
