"""What one rollout leaves behind: segments of token ids, the sampler's log-probs, a reward record.

A leaf: standard library and numpy only, so that rollout/ and rewards/ may import it.
The token rules it enforces: a sampled token is never re-encoded; only `model` segments carry log-probs (of
softmax(logits / T), as the sampler computed them) and have loss mask 1; a missing log-prob is an error, never a zero.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np

from rltk.errors import MismatchError

Kind = Literal["prompt", "model", "tool", "control", "boundary"]
KINDS = ("prompt", "model", "tool", "control", "boundary")
Version = tuple[int, int]  # (incarnation of the learner group, optimizer-step count): ordered, unique in a run


@dataclass(frozen=True)
class Record:
    """One problem of a task. `messages` is what the chat template renders; `data` is the task's own (JSON types)."""

    id: str
    messages: tuple[dict[str, str], ...]
    answer: str
    level: str = ""
    data: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class RewardRecord:
    """The reward of one trajectory. `value` None means that nobody could tell: the sample is masked, never scored 0."""

    value: float | None
    reason: str = ""  # why None, or how the value came about ("parsed", "timeout", ...)
    correct: bool | None = None  # the final answer is right
    flawed: bool | None = None  # right by its answer, wrong in a step (None: nobody checked)
    seconds: float = 0.0
    detail: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Segment:
    """A run of tokens of one origin. ids int32 [n]; logprobs float32 [n] for `model`, None for every other kind."""

    kind: Kind
    ids: np.ndarray
    logprobs: np.ndarray | None = None
    weight_version: Version | None = None
    finish_reason: str | None = None

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise MismatchError(f"segment kind {self.kind!r} is not one of {', '.join(KINDS)}")
        object.__setattr__(self, "ids", np.asarray(self.ids, dtype=np.int32))
        if self.ids.ndim != 1:
            raise MismatchError(f"segment ids have shape {self.ids.shape}; they must be flat, [n]")
        if self.kind != "model":
            if self.logprobs is not None:
                raise MismatchError(f"a {self.kind} segment carries log-probs; only model segments may")
            return
        if self.logprobs is None or self.weight_version is None:
            raise MismatchError("a model segment needs the sampler's log-probs and its weight version")
        object.__setattr__(self, "logprobs", np.asarray(self.logprobs, dtype=np.float32))
        if self.logprobs.shape != self.ids.shape:
            raise MismatchError(f"{len(self.ids)} sampled ids but log-probs of shape {self.logprobs.shape}")
        if not np.isfinite(self.logprobs).all():
            where = int(np.flatnonzero(~np.isfinite(self.logprobs))[0])
            raise MismatchError(f"log-prob of sampled token {where} is {self.logprobs[where]}: the sample is unusable")
        if (self.logprobs > 1e-4).any():
            raise MismatchError(f"log-prob {float(self.logprobs.max())} is above 0: not a log-probability")


@dataclass(frozen=True)
class ToolUse:
    """One tool call of a trajectory and how it ended: for metrics, rewards and people.

    `status` is one of rltk.rollout.tools.types.STATUSES; `code` is what was run, or the arguments as JSON; `output` is
    what the model was shown of the result. Seconds: `queue_s` waited for a place, `run_s` wall, `cpu_s` processor time.
    """

    turn: int
    name: str
    status: str
    code: str = ""
    output: str = ""
    queue_s: float = 0.0
    run_s: float = 0.0
    cpu_s: float = 0.0


@dataclass(frozen=True)
class Trajectory:
    """One sample of one prompt. Constructed only from whole segments; lengths are checked here and nowhere else.

    `uid` is the ledger's issue id; `group_id` joins the samples that share a baseline; `timing` holds seconds by stage.
    `text` is everything after the prompt, decoded: for people, never encoded again. `response` is what the model itself
    wrote of it: for rewards, as an answer that a tool printed is nobody's answer ("": no tool was used, `text` is all).
    `calls` are its tool calls in order, `notes` what interventions in its rollout counted (plain data).
    """

    uid: str
    prompt_id: str
    group_id: str
    segments: tuple[Segment, ...]
    text: str = ""
    reward: RewardRecord | None = None
    timing: dict[str, float] = field(default_factory=dict)
    response: str = ""
    calls: tuple[ToolUse, ...] = ()
    notes: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not self.segments or self.segments[0].kind != "prompt" or len(self.segments[0].ids) == 0:
            raise MismatchError(f"trajectory {self.uid} does not begin with a non-empty prompt segment")

    @property
    def answer_text(self) -> str:
        """What a rule reads: the model's own text, over all turns."""
        return self.response or ("" if self.calls else self.text)

    @property
    def ids(self) -> np.ndarray:
        """int32 [n]: every token, in order."""
        return np.concatenate([s.ids for s in self.segments])

    @property
    def mask(self) -> np.ndarray:
        """bool [n]: True on tokens that the model sampled."""
        return np.concatenate([np.full(len(s.ids), s.kind == "model") for s in self.segments])

    @property
    def logprobs(self) -> np.ndarray:
        """float32 [number of sampled tokens]: the sampler's log-probs, in order, of the masked tokens only."""
        parts = [s.logprobs for s in self.segments if s.logprobs is not None]
        return np.concatenate(parts) if parts else np.zeros(0, np.float32)

    @property
    def length(self) -> int:
        """Number of sampled tokens."""
        return sum(len(s.ids) for s in self.segments if s.kind == "model")

    @property
    def version(self) -> Version | None:
        """Weight version of the oldest sampled segment: the trajectory's staleness is counted from it."""
        return min((s.weight_version for s in self.segments if s.weight_version is not None), default=None)

    @property
    def truncated(self) -> bool:
        """The last sampled segment ended by length, not by the model."""
        reasons = [s.finish_reason for s in self.segments if s.kind == "model"]
        return bool(reasons) and reasons[-1] == "length"
