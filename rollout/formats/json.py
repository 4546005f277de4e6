"""Calls as JSON objects, the way the model's own chat template writes them (Qwen, Hermes, Llama 3, Mistral).

The template shows what stands around a call, and under which key its arguments are: nothing here knows a model's name.
Calls are read once the model has ended its turn; there may be several.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from rltk.errors import ConfigError
from rltk.rollout.formats.template import USER, TemplateTurns
from rltk.rollout.tools.types import Signature, ToolCall

NAME, ARGUMENTS = "a_function", {"an_argument": "a value"}
CALL_ID = "call00000"  # templates that want ids want nine letters or digits
BETWEEN = re.compile(r"[\s,;]*")
THOUGHT_ENDS = "</think>"  # a call that was only thought of is none
DECODER = json.JSONDecoder()


@dataclass(frozen=True)
class Syntax:
    """`opening` and `closing` stand around a call ("": nothing does); `arguments`: the key that holds them."""

    opening: str
    closing: str
    arguments: str


class JsonFormat:
    stops = ()

    def __init__(self, tokenizer: Any, stop_ids: Sequence[int], signatures: Sequence[Signature]) -> None:
        tools = [signature.function() for signature in signatures]
        self.turns = TemplateTurns(tokenizer, stop_ids, _reply(), _answers, tools)
        self.syntax = _syntax(self.turns, signatures)

    def calls(self, text: str, ended: bool) -> tuple[ToolCall, ...]:
        begin = text.rfind(THOUGHT_ENDS) + len(THOUGHT_ENDS) if THOUGHT_ENDS in text else 0
        if not self.syntax.opening:
            return self._bare(text, begin)
        found: list[ToolCall] = []
        while (start := text.find(self.syntax.opening, begin)) >= 0:
            calls, begin = self._listed(text, start, start + len(self.syntax.opening))
            found += calls
        return tuple(found)

    def appended(self, text: str, end: str, results: Sequence[str]) -> str:
        return self.turns.after(end, results)

    def _bare(self, text: str, begin: int) -> tuple[ToolCall, ...]:
        """Nothing marks a call: the turn is one if it begins with an object that has a name."""
        begin += len(text[begin:]) - len(text[begin:].removeprefix("<|python_tag|>").lstrip())
        if not re.match(r'\{\s*"', text[begin:]):
            return ()
        calls, _ = self._listed(text, begin, begin)
        return tuple(c for c in calls if c.name or re.match(r'\{\s*"(name|type)"', text[begin:]))

    def _listed(self, text: str, start: int, at: int) -> tuple[list[ToolCall], int]:
        """The objects from `at` on, up to the closing mark, and where that ends. A span begins where its mark does."""
        found: list[ToolCall] = []
        while True:
            at = _skip(text, at)
            closed = bool(self.syntax.closing) and text.startswith(self.syntax.closing, at)
            if closed or (found and not text.startswith("{", at)):
                end = at + len(self.syntax.closing) if closed else at
                if not found:
                    found.append(ToolCall("", {}, (start, end), "the call is empty"))
                return found, end
            try:
                value, end = DECODER.raw_decode(text, at)
            except ValueError as error:
                end = self._where_it_ends(text, at)
                return [*found, ToolCall("", {}, (start, end), f"the call is not valid JSON: {error}")], end
            close = _skip(text, end)
            closes = bool(self.syntax.closing) and text.startswith(self.syntax.closing, close)
            found.append(self._call(value, (start, close + len(self.syntax.closing) if closes else end)))
            start = at = end

    def _where_it_ends(self, text: str, at: int) -> int:
        close = text.find(self.syntax.closing, at) if self.syntax.closing else -1
        return len(text) if close < 0 else close + len(self.syntax.closing)

    def _call(self, value: Any, span: tuple[int, int]) -> ToolCall:
        if isinstance(value, dict) and isinstance(value.get("function"), dict):
            value = value["function"]
        name = value.get("name") if isinstance(value, dict) else None
        if not isinstance(name, str):
            return ToolCall("", {}, span, 'the call has no "name"')
        arguments = value.get(self.syntax.arguments, {})
        if isinstance(arguments, str):  # some models write the object as a string
            try:
                arguments = json.loads(arguments)
            except ValueError:
                return ToolCall(name, {}, span, f'"{self.syntax.arguments}" is not a JSON object')
        if not isinstance(arguments, dict):
            return ToolCall(name, {}, span, f'"{self.syntax.arguments}" is not a JSON object')
        return ToolCall(name, arguments, span)


def _skip(text: str, at: int) -> int:
    match = BETWEEN.match(text, at)
    return match.end() if match else at


def _reply() -> dict[str, Any]:
    call = {"type": "function", "id": CALL_ID, "function": {"name": NAME, "arguments": ARGUMENTS}}
    return {"role": "assistant", "content": "", "tool_calls": [call]}


def _answers(results: Sequence[str]) -> list[dict[str, Any]]:
    return [{"role": "tool", "name": NAME, "tool_call_id": CALL_ID, "content": text} for text in results]


def _syntax(turns: TemplateTurns, signatures: Sequence[Signature]) -> Syntax:
    """How the template writes a call. Raises ConfigError if it shows the model no tools, or no calls in JSON."""
    fix = "Fix: a template for function calling (model.chat_template=<file>), or another tools.format."
    shown = turns.render([USER], more=True)
    unseen = [signature.name for signature in signatures if signature.name not in shown]
    if unseen:
        raise ConfigError(f"the chat template does not tell the model of its tools ({', '.join(unseen)}). {fix}")
    rendered = turns.render(turns.beginning)
    plain = turns.render([USER, {"reasoning_content": "two", "role": "assistant", "content": "three"}])
    header = len(os.path.commonprefix([rendered, plain]))
    body = rendered[header : len(rendered) - len(os.path.commonprefix([rendered[::-1], plain[::-1]]))]
    for at in (match.start() for match in re.finditer(r"\{", body)):
        try:
            value, end = DECODER.raw_decode(body, at)
        except ValueError:
            continue
        inner = value.get("function") if isinstance(value.get("function"), dict) else value
        for key, arguments in inner.items() if inner.get("name") == NAME else ():
            if arguments == ARGUMENTS or arguments == json.dumps(ARGUMENTS):
                return Syntax(body[:at].strip(), body[end:].strip(), key)
    raise ConfigError(
        f"the chat template writes a call as {body.strip()!r:.300}, not as a JSON object with name and arguments. {fix}"
    )
