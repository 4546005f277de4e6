"""What a rollout is asked for. A leaf."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from rltk.trajectory import Record


@dataclass(frozen=True)
class Job:
    """One sample to roll out: the ledger's uid and group, the record, and the sampling seed.

    partial: what an earlier rollout left of it (RolloutResult.partial), to go on from there.
    """

    uid: str
    group: str
    record: Record
    seed: int
    partial: Any | None = None


@dataclass(frozen=True)
class Sampling:
    """`evaluation`: nothing is learned from it, and interventions of mode eval act."""

    temperature: float
    max_prompt_tokens: int
    max_response_tokens: int
    evaluation: bool = False
