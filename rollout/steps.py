"""What a trajectory on its way may ask for, what all of a rollout share, and what one keeps when it is paused."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from rltk.rollout.engine import Request
from rltk.rollout.formats import Format
from rltk.rollout.interventions import Intervention
from rltk.rollout.new_text import NewText
from rltk.rollout.tools.options import ToolOptions
from rltk.rollout.tools.types import ToolRequest, ToolResult
from rltk.trajectory import Segment, ToolUse

LIMITED = ("timeout", "oom", "output_limit", "killed")  # the model is told what fired


@dataclass(frozen=True)
class Sample:
    """Sample from the trajectory as it stands."""

    request: Request


@dataclass(frozen=True)
class Call:
    """Run these at once; results in this order."""

    requests: tuple[ToolRequest, ...]


@dataclass(frozen=True)
class Ask:
    """A question beside the trajectory, of which its tokens are no part."""

    request: Request


@dataclass(frozen=True)
class Done:
    """stop: the model ended it | done: the environment did | length: its budget of sampled tokens is spent |
    max_calls: the model wanted another | total_tokens: no room for another result | deadline: tools.deadline_s, which
    is looked at between turns."""

    reason: str


Step = Sample | Call | Ask | Done


@dataclass(frozen=True)
class TurnSettings:
    """What the trajectories of one rollout share. `context`: tokens that the engine holds of a sequence."""

    tokenizer: Any
    new_text: NewText
    format: Format
    options: ToolOptions
    names: tuple[str, ...]  # of the tools there are
    schemas: list[dict[str, Any]] | None  # what the chat template tells the model of them; None: nothing
    environment: bool
    stop_ids: tuple[int, ...]
    temperature: float
    max_prompt_tokens: int
    max_response_tokens: int
    context: int
    prompts: dict[str, list[int]] = field(default_factory=dict)  # ids by record: jobs of one prompt share them


@dataclass
class State:
    """All that a partial rollout keeps: plain data."""

    interventions: list[Intervention]
    segments: list[Segment] = field(default_factory=list)
    uses: list[ToolUse] = field(default_factory=list)
    history: list[tuple[str, dict[str, Any]]] = field(default_factory=list)  # successful calls: name, arguments
    requests: int = 0  # to the engine
    turn: int = 0
    turn_tokens: int = 0  # sampled in this turn
    new_tokens: int = 0  # of results and control text
    asked_tokens: int = 0  # sampled for questions
    not_asked: int = 0  # questions for which there was no room
    cut: int = 0  # results that were shortened
    control_left_out: int = 0  # control texts for which there was no room
    spent_s: float = 0.0  # in rollouts before this one


def shown_text(result: ToolResult) -> str:
    """What the model is told of a result, before it is cut to length."""
    if result.status in LIMITED:
        fired = f"{result.status}: {result.limit}" if result.limit else result.status
        return f"{result.text.rstrip()}\n[{fired}]".lstrip()
    return result.text.rstrip("\n")
