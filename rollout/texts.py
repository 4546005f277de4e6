"""The pieces of a trajectory by turns, and how they are written: small pure functions."""

from __future__ import annotations

import hashlib
import itertools
import json
from collections.abc import Sequence

import numpy as np

from rltk.errors import MismatchError
from rltk.rollout.engine import Completion
from rltk.rollout.new_text import NewText
from rltk.rollout.tools.options import ToolOptions
from rltk.rollout.tools.types import ToolCall, ToolResult
from rltk.trajectory import Segment, ToolUse


def turn_seed(seed: int, number: int) -> int:
    """Of the trajectory's request `number`: a hash, so that no two requests of a run share a stream."""
    digest = hashlib.blake2b(f"{seed}/{number}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") % (1 << 31)


def model_segment(completion: Completion) -> Segment:
    if completion.finish_reason not in ("stop", "length"):
        raise MismatchError(f"request {completion.uid} ended with {completion.finish_reason!r}, not by the model")
    return Segment(
        "model", completion.ids, completion.logprobs, completion.weight_version, completion.finish_reason
    )  # fmt: skip


def last_turn(segments: Sequence[Segment]) -> list[Segment]:
    """The model's since the last result or control text."""
    start = len(segments)
    while segments[start - 1].kind == "model":
        start -= 1
    return list(segments[start:])


def without_end(ids: list[int], stop_ids: Sequence[int]) -> list[int]:
    """Without the token that ended the turn."""
    return ids[:-1] if ids and ids[-1] in stop_ids else ids


def model_runs(segments: Sequence[Segment]) -> list[list[int]]:
    """Ids of the model's segments, those that follow each other joined."""
    runs = [(kind, list(run)) for kind, run in itertools.groupby(segments, key=lambda segment: segment.kind)]
    return [np.concatenate([s.ids for s in run]).tolist() for kind, run in runs if kind == "model"]


def observed(
    messages: tuple[dict[str, str], ...], new_text: NewText, options: ToolOptions, first: ToolResult
) -> tuple[dict[str, str], ...]:
    """The prompt with an environment's first observation: a user turn, or the end of the one that is there, as many
    templates take no two in a row."""
    if not first.text:
        return messages
    text = new_text.shorten(new_text.escape(first.text), options.output_tokens)
    if messages and messages[-1]["role"] == "user":
        return (*messages[:-1], {**messages[-1], "content": f"{messages[-1]['content']}\n\n{text}"})
    return (*messages, {"role": "user", "content": text})


def tool_use(turn: int, call: ToolCall, result: ToolResult, shown: str) -> ToolUse:
    code = call.arguments.get("code") if set(call.arguments) == {"code"} else None
    told = code if isinstance(code, str) else json.dumps(call.arguments, ensure_ascii=False)
    return ToolUse(turn, call.name, result.status, told, shown, result.queue_s, result.run_s, result.cpu_s)
