"""What passes between the turn loop, the executors and the tools. A leaf: standard library only."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

Status = Literal[
    "ok", "error", "timeout", "oom", "output_limit", "killed", "parse_error", "unknown_tool", "infra_error"
]
STATUSES: tuple[Status, ...] = (
    "ok", "error", "timeout", "oom", "output_limit", "killed", "parse_error", "unknown_tool", "infra_error"
)  # fmt: skip


@dataclass(frozen=True)
class ToolCall:
    """A call as it stands in a turn. `span`: its characters in the turn's text, fences included.

    `problem` set: the text was meant as a call and cannot be read as one; it is answered with parse_error, not run.
    """

    name: str
    arguments: dict[str, Any] = field(default_factory=dict)
    span: tuple[int, int] = (0, 0)
    problem: str = ""


@dataclass(frozen=True)
class ToolResult:
    """How a call ended. `text` is for the model: output, or the error's last lines.

    `limit` names what fired, with its value ("cpu 4 s", "wall 16 s", "memory 512 MiB", ...). `infra_error` is never
    shown to the model and never becomes a reward: the call is tried elsewhere, then the sample is left out.
    """

    status: Status
    text: str = ""
    limit: str = ""
    queue_s: float = 0.0  # waited for a free place
    run_s: float = 0.0  # wall time of the run
    cpu_s: float = 0.0
    done: bool = False  # of an environment: the episode is over


@dataclass(frozen=True)
class ToolRequest:
    """A call on its way to an executor.

    `trajectory` and `turn` say whose it is. `history`: arguments of this trajectory's earlier successful calls of the
    same tool, oldest first: what a session replays. `context`: the record's data for environments; never for code that
    the model wrote. `wait_s`: how long it may wait for a place; `deadline_s`: wall seconds once it has one.
    """

    trajectory: str
    turn: int
    name: str
    arguments: dict[str, Any]
    history: tuple[dict[str, Any], ...] = ()
    context: dict[str, Any] = field(default_factory=dict)
    deadline_s: float = 30.0
    wait_s: float = 300.0


@dataclass(frozen=True)
class Signature:
    """What the model is told of a tool: `parameters` is a JSON schema of an object."""

    name: str
    description: str
    parameters: dict[str, Any]

    def function(self) -> dict[str, Any]:
        """As chat templates take it in `tools`."""
        described = {"name": self.name, "description": self.description, "parameters": self.parameters}
        return {"type": "function", "function": described}


class Tool(Protocol):
    """One tool inside an executor. Any number of calls may be under way. A bad call is a ToolResult, never raised;
    what is raised is an infrastructure failure."""

    signature: Signature

    async def run(self, request: ToolRequest) -> ToolResult: ...
