"""Trajectories with tools, shared by tests: a way of calling that the tiny model has without being taught one.

Where it writes `17 + 4 =`, sampling halts; what stands before the sign is the call, and the result is appended.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from rltk.rollout.job import Job
from rltk.rollout.new_text import NewText
from rltk.rollout.steps import TurnSettings
from rltk.rollout.tokens import load_tokenizer, stop_ids
from rltk.rollout.tools.options import ToolOptions
from rltk.rollout.tools.types import ToolCall, ToolRequest, ToolResult
from rltk.trajectory import Record
from tests.integration.places import TINY

SUM = re.compile(r"(\d+ [+-] \d+) =\s*\Z")  # the last token reaches past the sign
TOOLS = ToolOptions(name="python", use=["python"], total_tokens=96, output_tokens=24)


class EqualsSign:
    stops = (" =",)

    def calls(self, text: str, ended: bool) -> tuple[ToolCall, ...]:
        if ended:
            return ()
        found = SUM.search(text)
        if found is None:
            return (ToolCall("python", {}, (len(text) - 1, len(text)), "no sum before ="),)
        return (ToolCall("python", {"code": f"print({found.group(1)})"}, found.span()),)

    def appended(self, text: str, end: str, results: Sequence[str]) -> str:
        return f"{'' if text[-1] == ' ' else ' '}{results[0]}\n\n"


def worked_out(request: ToolRequest) -> ToolResult:
    """In an executor's place: the sum."""
    first, sign, second = request.arguments["code"].removeprefix("print(").rstrip(")").split()
    value = int(first) + int(second) if sign == "+" else int(first) - int(second)
    return ToolResult("ok", str(value))


def problem(number: int, text: str = "What is 31 + 71 - 17 + 72?", answer: str = "157") -> Job:
    record = Record(f"r{number}", ({"role": "user", "content": text},), answer)
    return Job(f"u{number}", f"r{number}", record, seed=number)


def settings(tools: ToolOptions = TOOLS, response: int = 64, **changes: Any) -> TurnSettings:
    tokenizer = load_tokenizer(str(TINY))
    values = {
        "format": EqualsSign(), "options": tools, "names": ("python",), "schemas": None, "environment": False,
        "temperature": 1.0, "max_prompt_tokens": 48, "max_response_tokens": response,
        "context": 48 + response + tools.total_tokens,
    }  # fmt: skip
    stops = tuple(stop_ids(tokenizer, str(TINY)))
    return TurnSettings(tokenizer=tokenizer, new_text=NewText(tokenizer), stop_ids=stops, **{**values, **changes})
