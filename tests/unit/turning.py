"""A rollout by turns without an engine: a model that says what a test lets it say, in tokens of its own choice."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from rltk.rollout.engine import Completion, Request
from rltk.rollout.formats import build_format, told
from rltk.rollout.job import Job
from rltk.rollout.new_text import NewText
from rltk.rollout.steps import Ask, Call, Done, TurnSettings
from rltk.rollout.tools.options import ToolOptions
from rltk.rollout.tools.types import Signature, ToolRequest, ToolResult
from rltk.rollout.turns import Turns
from rltk.trajectory import Record
from tests.unit.some_tokenizers import tokenizer

PYTHON = Signature("python", "Runs Python.", {"type": "object", "properties": {"code": {"type": "string"}}})
CODE = "```python\nprint({})\n```\n```output"
QUESTION = Record("r", ({"role": "user", "content": "6 * 7?"},), "42", data={"start": 3})


def add(first: int, second: int) -> int:
    """The sum of two numbers."""
    return first + second


class Stairs:
    """An environment: say up, until step 5."""

    def reset(self, record_data: dict[str, Any]) -> str:
        self.at = record_data["start"]
        return f"You stand at {self.at}."

    def step(self, action: str) -> tuple[str, bool]:
        self.at += action == "up"
        return f"Now at {self.at}.", self.at == 5


def job(uid: str = "u", seed: int = 5, record: Record = QUESTION) -> Job:
    return Job(uid, "g", record, seed)


def settings(
    name: str = "plain", response: int = 400, context: int | None = None, signatures: Sequence[Signature] = (PYTHON,),
    environment: bool = False, **options: Any,
) -> TurnSettings:  # fmt: skip
    chosen = tokenizer(name)
    tools = ToolOptions(**{"name": "python", "use": ["python"], **options})
    stops = (int(chosen.eos_token_id),)
    return TurnSettings(
        tokenizer=chosen,
        new_text=NewText(chosen),
        format=build_format(tools, chosen, signatures, stops, environment),
        options=tools,
        names=tuple(signature.name for signature in signatures),
        schemas=told(tools, signatures, environment),
        environment=environment,
        stop_ids=stops,
        temperature=1.0,
        max_prompt_tokens=400,
        max_response_tokens=response,
        context=context or 400 + response + tools.total_tokens,
    )


def completion(
    request: Request, made: TurnSettings, text: str, end: bool | None = None, pieces: Sequence[str] | None = None
) -> Completion:
    """As the engine would end it: at a stop string, at its budget, or (`end`, by default without a stop string) with
    the end token. `pieces`: how the text is cut before it is tokenized, as a model need not tokenize as we do."""
    parts = [text] if pieces is None else list(pieces)
    ids = [i for part in parts for i in made.new_text.encode(part)]
    stop = None
    for count in range(1, len(ids) + 1):
        stop = next((s for s in request.stops if s in made.new_text.decode(ids[:count])), None)
        if stop is not None:
            ids = ids[:count]
            break
    if stop is None and end is not False:
        ids = [*ids, made.stop_ids[0]]
    reason = "stop" if stop is not None or end is not False else "length"
    if len(ids) > request.max_tokens:
        ids, stop, reason = ids[: request.max_tokens], None, "length"
    logprobs = -0.01 * (1 + np.arange(len(ids), dtype=np.float32)) - len(request.prompt_ids)
    return Completion(request.uid, np.asarray(ids), logprobs, reason, (0, 1), None, stop)


@dataclass
class Played:
    turns: Turns
    requests: list[Request] = field(default_factory=list)
    completions: list[Completion] = field(default_factory=list)
    called: list[ToolRequest] = field(default_factory=list)
    asked: list[Request] = field(default_factory=list)
    reason: str = ""


def play(
    turns: Turns,
    say: Callable[[Request, int], Completion],
    run: Callable[[ToolRequest], ToolResult] = lambda request: ToolResult("ok", "42"),
    reply: Callable[[Request], Completion] | None = None,
    between: Callable[[Turns], Turns] = lambda turns: turns,
) -> Played:
    """To the end. `between`: what becomes of it before each sampling (pause and resume)."""
    played = Played(turns)
    for _ in range(100):
        step = turns.next()
        assert turns.next() is step
        if isinstance(step, Done):
            played.reason = step.reason
            played.turns = turns
            return played
        if isinstance(step, Call):
            played.called += step.requests
            turns.results([run(request) for request in step.requests])
        elif isinstance(step, Ask):
            assert reply is not None
            played.asked.append(step.request)
            turns.asked(reply(step.request))
        else:
            turns = between(turns)
            request = turns.next().request
            said = say(request, len(played.requests))
            played.requests.append(request)
            played.completions.append(said)
            turns.sampled(said)
    raise AssertionError("it never ends")


def script(made: TurnSettings, *texts: str, **how: Any) -> Callable[[Request, int], Completion]:
    """One text a sampling, the last one again and again."""
    return lambda request, number: completion(request, made, texts[min(number, len(texts) - 1)], **how)
