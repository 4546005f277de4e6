"""isolation=remote: a sandbox server that speaks SandboxFusion's `POST /run_code` (bytedance.github.io/SandboxFusion).

  ask     {"code", "language": "python", "run_timeout", "compile_timeout", "memory_limit_MB", "stdin"}
  answer  {"status": Success | Failed | SandboxError, "message",
           "run_result": {"status": Finished | TimeLimitExceeded | Error, "return_code", "stdout", "stderr",
                          "execution_time"}}

What is not such an answer (no connection, another HTTP status, garbage, SandboxError) is the server's failure:
infra_error, tried again by the client elsewhere. Servers of this kind count no processor time; the limit is wall time.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import time
from typing import Any
from urllib.parse import urlsplit

import aiohttp

from rltk.errors import ConfigError, InfrastructureError
from rltk.rollout.tools.options import JailOptions
from rltk.rollout.tools.types import ToolResult

START_S = 30.0  # for the test program at the start
SIGKILL_CODES = (-9, 137)


class RemoteSandbox:
    """At most `connections` calls at once. Belongs to one event loop."""

    def __init__(self, options: JailOptions, connections: int) -> None:
        self._shown = _host(options.url)
        self._url = str(options.url).rstrip("/") + "/run_code"
        self._options, self._connections = options, connections
        self._wall_s = options.cpu_s * options.wall_factor
        self._output = options.output_kib * 1024
        self._session: aiohttp.ClientSession | None = None

    async def ready(self) -> str:
        result = await self.run("print(6 * 7)", START_S)
        if result.status != "ok" or result.text.strip() != "42":
            await self.close()
            raise InfrastructureError(
                f"the sandbox server {self._shown} (tools.jail.url) did not run a test program: {result.status} "
                f"{result.text[:200]!r}; is it up, and does it run Python?"
            )
        return f"remote: {self._shown}"

    async def run(self, source: str, deadline_s: float) -> ToolResult:
        """Within `deadline_s`, of which the program may have tools.jail's wall time."""
        allowed_s = min(self._wall_s, deadline_s)
        begin = time.monotonic()
        question = {
            "code": source,
            "language": "python",
            "stdin": "",
            "run_timeout": allowed_s,
            "compile_timeout": allowed_s,
            "memory_limit_MB": self._options.memory_mib,
        }
        try:
            body = await self._post(question, deadline_s)
        except TimeoutError:
            return self._failed(f"did not answer within {deadline_s:.1f} s")
        except (aiohttp.ClientError, OSError) as error:
            return self._failed(f"failed: {type(error).__name__}: {error}")
        if isinstance(body, int):
            return self._failed(f"answered with HTTP status {body}")
        result = self._read(body, allowed_s, time.monotonic() - begin)
        if result.status == "timeout" and allowed_s < self._wall_s:
            return self._failed(f"was given {allowed_s:.1f} s of {self._wall_s:g} s: its call's deadline came first")
        return result

    async def close(self) -> None:
        if self._session is not None:
            await self._session.close()
            self._session = None

    async def _post(self, question: dict[str, Any], deadline_s: float) -> bytes | int:
        """The body, cut at what an answer can need; or the HTTP status, if it is not 200."""
        if self._session is None:
            connector = aiohttp.TCPConnector(limit=self._connections)
            no_timeout = aiohttp.ClientTimeout(total=None)  # the call's deadline is the only one
            self._session = aiohttp.ClientSession(connector=connector, timeout=no_timeout)
        async with asyncio.timeout(deadline_s), self._session.post(self._url, json=question) as response:
            if response.status != 200:
                return response.status
            body, most = bytearray(), 12 * self._output + 65536  # JSON writes one byte in up to six
            async for part in response.content.iter_chunked(65536):
                body += part
                if len(body) > most:
                    break
            return bytes(body)

    def _read(self, body: bytes, allowed_s: float, took_s: float) -> ToolResult:
        if len(body) > 12 * self._output and b'"run_result"' in body[:4096]:
            return ToolResult("output_limit", limit=f"output {self._options.output_kib} KiB", run_s=took_s)
        try:
            answer = json.loads(body)
            run = answer["run_result"] or {}
            status, ended = answer["status"], run.get("status")
            stdout, stderr = run.get("stdout") or "", run.get("stderr") or ""
            code, run_s = run.get("return_code"), float(run.get("execution_time") or took_s)
            if not isinstance(stdout, str) or not isinstance(stderr, str):
                raise TypeError("stdout and stderr must be texts")
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
            return self._failed(f"answered with what is no answer of /run_code: {error!r}: {body[:80]!r}")
        if status == "SandboxError" or ended == "Error":
            return self._failed(f"reports an error of its own: {str(answer.get('message'))[:200]}")
        if ended == "TimeLimitExceeded":
            return ToolResult("timeout", stdout[: self._output], f"wall {allowed_s:g} s", run_s=run_s)
        if status not in ("Success", "Failed") or ended != "Finished" or not isinstance(code, int):
            return self._failed(f"answered with status {status!r}, run status {ended!r}, return code {code!r}")
        if len((stdout + stderr).encode(errors="replace")) > self._output:
            limit = f"output {self._options.output_kib} KiB"
            return ToolResult("output_limit", stdout[: self._output], limit, run_s=run_s)
        if code == 0:
            return ToolResult("ok", stdout, run_s=run_s)
        last = stderr.strip().rpartition("\n")[2]
        if last.startswith("MemoryError"):
            return ToolResult("oom", stdout, f"memory {self._options.memory_mib} MiB", run_s=run_s)
        if code in SIGKILL_CODES:
            return ToolResult("killed", stdout, "signal 9", run_s=run_s)
        separator = "" if not stdout or stdout.endswith("\n") else "\n"
        return ToolResult("error", f"{stdout}{separator}{last or f'exit code {code}'}", run_s=run_s)

    def _failed(self, words: str) -> ToolResult:
        return ToolResult("infra_error", f"the sandbox server {self._shown} {words}")


def _host(url: str | None) -> str:
    """The server as it is shown: without path and credentials."""
    with contextlib.suppress(ValueError):  # of a port that is no number
        parts = urlsplit(url or "")
        if parts.scheme in ("http", "https") and parts.hostname:
            return f"{parts.scheme}://{parts.hostname}" + (f":{parts.port}" if parts.port else "")
    raise ConfigError(
        "tools.jail.isolation=remote needs tools.jail.url, the sandbox server as http://host:8080 (it is asked at "
        "<url>/run_code)"
    )
