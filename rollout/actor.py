"""The Ray actor around a RolloutEngine: an event loop for callers, one thread for vLLM."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import queue
import threading
import time
from collections.abc import AsyncIterator, Callable, Sequence
from concurrent.futures import Future
from dataclasses import asdict, dataclass, field
from typing import Any, NoReturn

from rltk import watch
from rltk.errors import RltkError
from rltk.rollout.engine import Completion, EngineOptions, Request, RolloutEngine
from rltk.trajectory import Version

log = logging.getLogger("rltk.rollout")


@dataclass
class Channel:
    """One stream of completions; None in `done` closes it."""

    loop: asyncio.AbstractEventLoop
    done: asyncio.Queue
    left: set[str] = field(default_factory=set)


class EngineActor:
    """`ray.remote` is applied where it is placed (rltk/roles.py), so that it can be used without Ray in tests.

    All of vLLM runs on one thread: commands are taken between two engine steps, in the order they came.
    """

    def __init__(self, options: EngineOptions, version: Version = (0, 0)) -> None:
        self._commands: queue.Queue[tuple[Callable[[RolloutEngine], Any], Future]] = queue.Queue()
        self._sinks: dict[str, tuple[asyncio.AbstractEventLoop, asyncio.Queue]] = {}
        self._channels: dict[str, Channel] = {}
        self._tokens = 0
        self._busy = 0.0
        self._ready: Future = Future()
        self._thread = threading.Thread(target=self._run, args=(options, version), name="vllm", daemon=True)
        self._thread.start()

    async def ready(self) -> Version:
        """Returns once the engine stands; raises what kept it from starting."""
        return await asyncio.wrap_future(self._ready)

    async def generate(
        self, requests: Sequence[Request], channel: str | None = None
    ) -> AsyncIterator[list[Completion]]:
        """Stream completions as they finish. All requests are added, in order, before the next engine step.

        With a channel (a name of the caller's), the stream goes on until `close`, over what `extend` adds to it.
        """
        stream = Channel(asyncio.get_running_loop(), asyncio.Queue())
        left = stream.left
        if channel is not None:
            self._channels[channel] = stream
        try:
            await self._add(stream, requests)
            while left or channel is not None:
                batch = [await stream.done.get()]
                while not stream.done.empty():
                    batch.append(stream.done.get_nowait())
                for item in batch:
                    if isinstance(item, BaseException):
                        raise item
                    if item is not None:
                        left.discard(item.uid)
                if None in batch:  # closed
                    return
                yield batch
        finally:
            if channel is not None:
                self._channels.pop(channel, None)
            for uid in left:
                self._sinks.pop(uid, None)
            if left:
                with contextlib.suppress(Exception):  # the engine may be what failed; that error is the one to see
                    await self._call(lambda engine: engine.abort(sorted(left)))

    async def extend(self, channel: str, requests: Sequence[Request]) -> None:
        """More requests for an open stream: in order, before the next engine step."""
        if channel not in self._channels:
            raise RltkError(f"there is no stream {channel} to extend: it was closed, or dropped")
        await self._add(self._channels[channel], requests)

    async def close(self, channel: str) -> None:
        """End a stream; what still runs on it is aborted."""
        if channel in self._channels:
            self._channels[channel].done.put_nowait(None)

    async def _add(self, stream: Channel, requests: Sequence[Request]) -> None:
        for request in requests:
            self._sinks[request.uid] = (stream.loop, stream.done)
            stream.left.add(request.uid)
        await self._call(lambda engine: engine.add(requests))

    async def drop(self) -> None:
        """Abort whatever runs: those who asked for it have given up, or hear of it now."""
        uids = list(self._sinks)
        await self._call(lambda engine: engine.abort(engine.running))
        for uid in uids:
            self._deliver(uid, RltkError(f"request {uid} was dropped: its rollout is issued anew"))
        for channel, stream in self._channels.items():  # one may be open while nothing runs on it
            stream.done.put_nowait(RltkError(f"stream {channel} was dropped: its rollout is issued anew"))

    async def load_weights(self, path: str, version: Version) -> tuple[Version, str]:
        """Acknowledges with the version now in place and the checksum of the bytes that arrived."""
        checksum = await self._call(lambda engine: engine.load_weights(path, version))
        return version, checksum

    async def score(self, sequences: Sequence[Sequence[int]]) -> list[Any]:
        return await self._call(lambda engine: engine.score(sequences))

    async def stats(self) -> dict[str, float]:
        """Tokens sampled and seconds spent inside vLLM since the start."""
        return {"tokens": self._tokens, "busy_seconds": self._busy}

    async def cache(self) -> dict[str, Any]:
        """What was proved to run of a compressed KV cache (rltk.rollout.kv.proof.Active); {}: vLLM's own cache."""
        return await self._call(lambda engine: asdict(engine.active) if engine.active else {})

    async def stacks(self) -> str:
        return watch.stacks()

    async def _call(self, command: Callable[[RolloutEngine], Any]) -> Any:
        await self.ready()
        future: Future = Future()
        self._commands.put((command, future))
        return await asyncio.wrap_future(future)

    def _run(self, options: EngineOptions, version: Version) -> None:
        try:
            engine = RolloutEngine(options, version)
        except BaseException as error:
            self._ready.set_exception(error)
            return
        self._ready.set_result(version)
        while True:
            self._take_commands(engine)
            if not engine.unfinished:
                continue
            start = time.perf_counter()
            try:
                completions = engine.step()
            except BaseException as error:
                log.exception("the engine failed in a step and is of no more use")
                self._refuse(error)
            self._busy += time.perf_counter() - start
            for completion in completions:
                self._tokens += len(completion.ids)
                self._deliver(completion.uid, completion)

    def _refuse(self, error: BaseException) -> NoReturn:
        """Everybody who waits, and whoever still comes, hears why the engine stopped."""
        for uid in list(self._sinks):
            self._deliver(uid, error)
        while True:
            future = self._commands.get()[1]
            if future.set_running_or_notify_cancel():
                future.set_exception(error)

    def _take_commands(self, engine: RolloutEngine) -> None:
        """Run what is queued; with nothing to generate, block for the next command."""
        while True:
            try:
                command, future = self._commands.get(block=not engine.unfinished)
            except queue.Empty:
                return
            if not future.set_running_or_notify_cancel():
                continue  # whoever asked has gone
            try:
                future.set_result(command(engine))
            except BaseException as error:  # the caller's error; the engine goes on
                future.set_exception(error)

    def _deliver(self, uid: str, item: Completion | BaseException) -> None:
        sink = self._sinks.pop(uid, None)
        if sink is not None:
            loop, done = sink
            loop.call_soon_threadsafe(done.put_nowait, item)
