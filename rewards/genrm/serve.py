"""Optional: the service over HTTP for programs outside the run, with Ray Serve (`pip install "ray[serve]"`).

  POST /judge   {"questions": [{"problem", "response", "reference", "uid", "group", "data"}], "deadline_s"}
                -> {"verdicts": [{"value", "flawed", "cause", "detail", "seconds"}]}, one for each question, in order;
                problem and response are needed, the rest is not
  GET  /health  -> the service's counts; 503 if it does not answer

Errors are {"error": text}. Nobody is asked for a key: keep it on 127.0.0.1, or behind a proxy that asks.
"""

from __future__ import annotations

import asyncio
import json
from dataclasses import asdict
from typing import Any

from ray import serve
from starlette.requests import Request
from starlette.responses import JSONResponse

from rltk.rewards.genrm.client import GenRMClient
from rltk.rewards.genrm.options import GenRMOptions
from rltk.rewards.genrm.types import Question

# Serve's own defaults (2 and 5 requests at once) leave a continuously batching engine idle.
TARGET_ONGOING, MAX_ONGOING = 64, 256
LARGEST_BODY = 1 << 25  # bytes
HEALTH_S = 10.0
NAME = "genrm"


class Front:
    """What Serve runs. `service`: handle of a GenRMService actor."""

    def __init__(self, service: Any, options: GenRMOptions) -> None:
        self._service, self._options = service, options
        self._client = GenRMClient(service, options, owner="http front")

    async def __call__(self, request: Request) -> JSONResponse:
        asked = request.method, request.url.path.rstrip("/")
        if asked == ("GET", "/health"):
            return await self._health()
        if asked == ("POST", "/judge"):
            return await self._judge(request)
        return _error(404, "there are POST /judge and GET /health")

    async def _health(self) -> JSONResponse:
        try:
            async with asyncio.timeout(HEALTH_S):
                return JSONResponse({"status": "ok", **await self._service.stats.remote()})
        except Exception as error:
            return _error(503, f"the service does not answer: {type(error).__name__}")

    async def _judge(self, request: Request) -> JSONResponse:
        body = bytearray()
        async for part in request.stream():
            body += part
            if len(body) > LARGEST_BODY:
                return _error(413, f"at most {LARGEST_BODY} bytes")
        try:
            questions, deadline_s = parse(bytes(body), self._options)
        except (ValueError, RecursionError) as error:
            return _error(400, str(error))
        verdicts = await self._client.judge(questions, deadline_s)
        return JSONResponse({"verdicts": [asdict(verdict) for verdict in verdicts]})


def parse(body: bytes, options: GenRMOptions) -> tuple[list[Question], float]:
    """What POST /judge asks. Raises ValueError saying what is wrong with it."""
    asked = json.loads(body)
    rows = asked.get("questions") if isinstance(asked, dict) else None
    if not isinstance(rows, list) or not 0 < len(rows) <= options.queue:
        raise ValueError(f'"questions" must be a list of 1 to {options.queue} questions')
    if unknown := sorted(asked.keys() - {"questions", "deadline_s"}):
        raise ValueError(f"{', '.join(unknown)} unknown; there are questions, deadline_s")
    deadline_s = asked.get("deadline_s", options.deadline_s)
    if type(deadline_s) not in (int, float) or not 0 < deadline_s <= options.deadline_s:
        raise ValueError(f'"deadline_s" must be a number of seconds up to {options.deadline_s:g}')
    return [_question(number, row) for number, row in enumerate(rows)], float(deadline_s)


def _question(number: int, row: Any) -> Question:
    if not isinstance(row, dict):
        raise ValueError(f"question {number} must be an object")
    given = {"uid": f"http-{number}", "reference": None, "group": "", "data": {}, **row}
    kinds = {"uid": str, "problem": str, "response": str, "reference": str | None, "group": str, "data": dict}
    if wrong := [name for name, kind in kinds.items() if not isinstance(given.get(name, ...), kind)]:
        raise ValueError(f"question {number}: {', '.join(wrong)} missing or of another type")
    if unknown := sorted(given.keys() - kinds.keys()):
        raise ValueError(f"question {number}: {', '.join(unknown)} unknown; there are {', '.join(kinds)}")
    return Question(**given)


def start(service: Any, options: GenRMOptions, host: str = "127.0.0.1", port: int = 8000, replicas: int = 1) -> str:
    """Serve it, with up to `replicas` fronts; returns its address. Ray must run. `stop` ends it."""
    serve.start(http_options={"host": host, "port": port})
    scaling = {"min_replicas": 1, "max_replicas": replicas, "target_ongoing_requests": TARGET_ONGOING}
    deployment = serve.deployment(
        autoscaling_config=scaling,
        max_ongoing_requests=MAX_ONGOING,
        max_queued_requests=options.queue,
        ray_actor_options={"num_cpus": 0},
    )
    serve.run(deployment(Front).bind(service, options), name=NAME, route_prefix="/")
    return f"http://{host}:{port}"


def stop() -> None:
    """End the front and Serve itself. The service goes on."""
    serve.shutdown()


def _error(status: int, words: str) -> JSONResponse:
    return JSONResponse({"error": words}, status)
