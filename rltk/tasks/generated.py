"""What generated tasks share: an endless training stream and a held-out set that are disjoint by construction.

The hash of a problem's text alone decides on which side it falls, so whatever draws problems - the RL stream under any
seed, supervised data, an evaluation - agrees, and no list of held-out problems has to be carried about.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Iterable, Sequence
from dataclasses import replace

from rltk.errors import ConfigError
from rltk.trajectory import Record

HELD_OUT_SHARE = 0.1
_TRIES = 10_000  # draws before we say that the options leave no problem on the side asked for


def is_held_out(content: str, share: float = HELD_OUT_SHARE) -> bool:
    """Whether the problem with this text belongs to the held-out side. The same on every machine and Python."""
    digest = hashlib.blake2b(content.encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") < share * 2**64


class GeneratedTask:
    """Base of tasks that draw problems: a subclass defines `draw` and `score`.

    `levels` are drawn uniformly in training and in turn in the held-out set. `seed` gives another training stream of
    the same problems; the held-out set does not depend on it.
    """

    name = "generated"
    size: int | None = None

    def __init__(self, levels: Iterable[int], seed: int, max_prompt_tokens: int, max_response_tokens: int):
        self.levels: Sequence[int] = tuple(levels)
        self.seed = seed
        self.max_prompt_tokens = max_prompt_tokens
        self.max_response_tokens = max_response_tokens
        if not self.levels or any(not isinstance(n, int) or isinstance(n, bool) or n < 1 for n in self.levels):
            raise ConfigError(f"task.levels={list(self.levels)} must be a list of positive integers, e.g. [1,2,3]")

    def draw(self, rng: random.Random, level: int) -> Record:
        """A problem of this level, on either side of the split. Its id is filled in by the caller."""
        raise NotImplementedError

    def sample(self, rng: random.Random, level: int, held_out: bool = False) -> Record:
        """A problem of this level from the asked side of the split."""
        for _ in range(_TRIES):
            record = self.draw(rng, level)
            if is_held_out(_content(record)) == held_out:
                return record
        side = "held-out" if held_out else "training"
        raise ConfigError(f"task {self.name}: no {side} problem of level {level} in {_TRIES} draws; widen its options")

    def problem(self, index: int) -> Record:
        if index < 0:
            raise IndexError(f"task {self.name}: problem index {index} is negative")
        rng = random.Random(f"{self.name}/train/{self.seed}/{index}")
        return replace(self.sample(rng, rng.choice(self.levels)), id=f"{self.name}/{index}")

    def held_out(self, count: int) -> list[Record]:
        rng = random.Random(f"{self.name}/held-out")
        records: dict[str, Record] = {}
        repeats = 0
        while len(records) < count:
            record = self.sample(rng, self.levels[len(records) % len(self.levels)], held_out=True)
            content = _content(record)
            repeats += content in records
            if repeats > _TRIES:
                raise ConfigError(f"task {self.name}: fewer than {count} distinct held-out problems; ask for fewer")
            records.setdefault(content, replace(record, id=f"{self.name}/held-out/{len(records)}"))
        return list(records.values())


def _content(record: Record) -> str:
    return record.messages[-1]["content"]  # the question; a system message is not part of the problem
