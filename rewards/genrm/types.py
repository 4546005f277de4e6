"""What judges, the service and its backends say to each other. A leaf: standard library and `rltk.errors` only."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from rltk.errors import InfrastructureError


class JudgeUnavailable(InfrastructureError):
    """No reply could be had. `cause` is one word for counters: timeout, unavailable, queue_full, cancelled, ..."""

    def __init__(self, cause: str, message: str = ""):
        super().__init__(message or cause)
        self.cause = cause

    def __reduce__(self) -> tuple[Any, ...]:  # both arguments survive the way between processes
        return type(self), (self.cause, str(self))


@dataclass(frozen=True)
class Prompt:
    """One generation asked of a judge model: a chat, at most `max_tokens` of reply, and how to sample it."""

    messages: tuple[dict[str, str], ...]
    max_tokens: int
    temperature: float = 0.0
    seed: int = 0


@dataclass(frozen=True)
class Reply:
    """What the model wrote. `finish_reason` is the engine's: stop, length, ...; `tokens` of reply; who answered."""

    text: str
    finish_reason: str
    tokens: int
    replica: str = ""


@dataclass(frozen=True)
class Question:
    """What a judge is asked about: one response. `group` is its prompt's group; `data` belongs to the judge."""

    uid: str
    problem: str
    response: str
    reference: str | None
    group: str = ""
    data: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Verdict:
    """`value`: the judge's score in [0, 1]; None if nobody could tell, and then `cause` says why.

    `flawed`: whether the response is flawed, for judges that look for it, else None. `cause` is "" exactly when `value`
    is a number: parse_fail, timeout, unavailable, queue_full, cancelled, ... `detail`: what the judge found (index,
    replies asked for, template version, agreement, ...), values JSON can hold. `seconds` of wall time.
    """

    value: float | None
    flawed: bool | None = None
    cause: str = ""
    detail: dict[str, Any] = field(default_factory=dict)
    seconds: float = 0.0

    def __post_init__(self) -> None:
        if (self.value is None) != bool(self.cause):
            raise ValueError(f"a verdict has a value or a cause, got value {self.value} and cause {self.cause!r}")
        if self.value is not None and not 0.0 <= self.value <= 1.0:  # also refuses nan
            raise ValueError(f"a verdict's value lies in [0, 1], got {self.value}")
        if self.value is None and self.flawed is not None:
            raise ValueError(f"a verdict without a value has no label, got flawed={self.flawed}")


@dataclass(frozen=True)
class Comparison:
    """Several responses to one problem, compared. `best` is None where `cause` says why, as in `Verdict`.

    `scores`: one in [0, 1] per response, in the order given (for a pair: 1/0, or .5/.5 if the two orders disagree).
    `consistency`: share of the questions asked in both orders whose answers agree; None if none was answered in both.
    """

    best: int | None
    scores: tuple[float, ...] = ()
    consistency: float | None = None
    cause: str = ""
    detail: dict[str, Any] = field(default_factory=dict)
    seconds: float = 0.0


Ask = Callable[[Prompt], Awaitable[Reply]]  # what a judge speaks with; raises JudgeUnavailable


class Judge(Protocol):
    """Scores one response. `version` names templates and every option that can change a verdict: a cache key's part.

    `judge` never raises JudgeUnavailable: it returns a Verdict without a value and with the cause. A class may say by
    `when` which samples of a run it is for, by what the rule found: right | wrong | all (if it says nothing).
    """

    name: str
    version: str

    async def judge(self, question: Question, ask: Ask) -> Verdict: ...


class Comparer(Protocol):
    """Compares responses to one problem, likewise."""

    name: str
    version: str

    async def compare(self, problem: str, responses: Sequence[str], ask: Ask) -> Comparison: ...
