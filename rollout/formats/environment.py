"""Every turn is an action, its observation the next user turn, as the model's chat template writes them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from rltk.rollout.formats.template import TemplateTurns
from rltk.rollout.tools.types import ToolCall


class EnvironmentFormat:
    stops = ()

    def __init__(self, tokenizer: Any, stop_ids: Sequence[int], name: str) -> None:
        self.name = name
        self.turns = TemplateTurns(
            tokenizer, stop_ids, {"role": "assistant", "content": "three"},
            lambda results: [{"role": "user", "content": "\n".join(results)}],
        )  # fmt: skip

    def calls(self, text: str, ended: bool) -> tuple[ToolCall, ...]:
        return (ToolCall(self.name, {"action": text}, (0, len(text))),)

    def appended(self, text: str, end: str, results: Sequence[str]) -> str:
        return self.turns.after(end, results)
