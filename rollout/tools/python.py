"""tools=python: code that the model wrote, in a jail on this machine or in a sandbox server."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from rltk.rollout.tools.options import JailOptions, ToolOptions
from rltk.rollout.tools.session import compose, renumbered
from rltk.rollout.tools.threads import Threads
from rltk.rollout.tools.types import Signature, ToolRequest, ToolResult

if TYPE_CHECKING:
    from rltk.rollout.tools.remote import RemoteSandbox

STATELESS = "Runs a Python program and returns what it prints. Nothing is kept from one call to the next."
REPLAY = "Runs Python code and returns what it prints. Variables are kept from one call to the next."


def signature(options: ToolOptions) -> Signature:
    parameters = {"type": "object", "properties": {"code": {"type": "string"}}, "required": ["code"]}
    return Signature("python", REPLAY if options.session == "replay" else STATELESS, parameters)


class PythonTool:
    """Arguments: {"code": text}. Under tools.session=replay, `history` is what is repeated first."""

    def __init__(self, options: ToolOptions) -> None:
        """Raises ConfigError where the isolation asked for is not to be had on this machine."""
        self.signature = signature(options)
        self._replay = options.session == "replay"
        self._place: RemoteSandbox | LocalJail
        if options.jail.isolation == "remote":
            from rltk.rollout.tools.remote import RemoteSandbox  # aiohttp takes half a second

            self._place = RemoteSandbox(options.jail, options.slots)
        else:
            self._place = LocalJail(options.jail, options.slots)

    async def ready(self) -> str:
        """The isolation reached. Raises InfrastructureError if a sandbox server cannot run a program."""
        return await self._place.ready()

    async def run(self, request: ToolRequest) -> ToolResult:
        code = request.arguments.get("code")
        if not isinstance(code, str) or len(request.arguments) != 1:
            return ToolResult("parse_error", "python takes one argument, code, a text")
        if not self._replay:
            return await self._place.run(code, request.deadline_s)
        program = compose([str(earlier["code"]) for earlier in request.history], code)
        result = await self._place.run(program, request.deadline_s)
        return replace(result, text=renumbered(result.text)) if result.status == "error" else result


class LocalJail:
    def __init__(self, options: JailOptions, slots: int) -> None:
        from rltk.rollout.jail import Jail

        self._jail = Jail(options)
        self._wall_s = options.cpu_s * options.wall_factor
        self._threads = Threads("python", slots)

    async def ready(self) -> str:
        return self._jail.level

    async def run(self, source: str, deadline_s: float) -> ToolResult:
        result = await self._threads.run(self._jail.run, source, "", deadline_s)
        return cut_short(result, deadline_s, self._wall_s)


def cut_short(result: ToolResult, allowed_s: float, wall_s: float) -> ToolResult:
    """A program that was stopped before its own wall limit, as its call's deadline came first, did not time out: nobody
    can tell what it would have done."""
    if result.status != "timeout" or not result.limit.startswith("wall") or allowed_s >= wall_s:
        return result
    words = f"stopped after {allowed_s:.1f} s of {wall_s:g} s of wall time: its call's deadline came first"
    return ToolResult("infra_error", words, result.limit, run_s=result.run_s, cpu_s=result.cpu_s)
