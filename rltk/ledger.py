"""Exactly-once bookkeeping of prompts: every issue ends `trained` or `dropped(reason)`.

    issued = in flight + scored + trained + dropped          (between any two calls)

An issue is one sample of one prompt: (prompt index, epoch, attempt, sample). The ledger is plain data: it is committed
with every checkpoint, and after a rollback whatever was trained since is issued again, in the same order.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from rltk.errors import MismatchError


@dataclass(frozen=True)
class Issue:
    """One sample to roll out. `index` is the task's problem index; `group` joins the samples of one prompt."""

    index: int
    epoch: int
    sample: int
    attempt: int = 0

    @property
    def group(self) -> str:
        return f"{self.epoch}/{self.index}"

    @property
    def uid(self) -> str:
        return f"{self.epoch}/{self.index}/{self.sample}/{self.attempt}"

    def seed(self, run_seed: int, turn: int = 0) -> int:
        """The request's sampling seed: a hash of (run seed, prompt, epoch, sample, turn), so a run can be repeated.

        The attempt is left out: a request that is re-issued after a dead engine samples the same tokens.
        """
        text = f"{run_seed}/{self.index}/{self.epoch}/{self.sample}/{turn}"
        return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big") % (1 << 31)


@dataclass
class Ledger:
    """`size` problems an epoch (None: endless, one epoch). States move in_flight -> scored -> trained | dropped."""

    seed: int
    size: int | None = None
    cursor: int = 0  # prompts drawn so far
    issued: int = 0  # samples issued so far, attempts included
    trained: int = 0
    dropped: Counter[str] = field(default_factory=Counter)
    dropped_by_length: Counter[str] = field(default_factory=Counter)
    reissued: int = 0
    in_flight: dict[str, Issue] = field(default_factory=dict)
    scored: dict[str, Issue] = field(default_factory=dict)

    def check(self) -> None:
        """The equation above. MismatchError if a sample got lost or was counted twice."""
        found = len(self.in_flight) + len(self.scored) + self.trained + sum(self.dropped.values())
        if found != self.issued:
            raise MismatchError(f"ledger: {self.issued} samples were issued, {found} are accounted for")

    def issue(self, prompts: int, samples: int) -> list[Issue]:
        """The next `prompts` prompts in the task's order, `samples` samples each."""
        return self.issue_problems(self.draw(prompts), samples)

    def draw(self, prompts: int) -> list[tuple[int, int]]:
        """(index, epoch) of the next prompts in the task's order. Whoever draws may issue only some of them."""
        positions = range(self.cursor, self.cursor + prompts)
        self.cursor += prompts
        return [self._problem(position) for position in positions]

    def issue_problems(self, problems: Sequence[tuple[int, int]], samples: int) -> list[Issue]:
        """`samples` samples of each (index, epoch), in the order in which the engine will see them."""
        issues = [Issue(index, epoch, sample) for index, epoch in problems for sample in range(samples)]
        for issue in issues:
            if issue.uid in self.in_flight or issue.uid in self.scored:
                raise MismatchError(f"issue {issue.uid} is already under way: one prompt twice in a step")
            self.in_flight[issue.uid] = issue
        self.issued += len(issues)
        self.check()
        return issues

    def _problem(self, position: int) -> tuple[int, int]:
        """The problem at a position of the run: endless tasks in order, finite ones permuted anew every epoch."""
        if self.size is None:
            return self.seed * 10**9 + position, 0  # another seed meets other problems
        epoch, place = divmod(position, self.size)
        return _permuted(place, self.size, f"{self.seed}/{epoch}"), epoch

    def retry(self, uid: str) -> Issue:
        """The same sample again, after an infrastructure failure: one more attempt, the old one counted dropped."""
        old = self._take(self.in_flight, uid)
        self.dropped["reissued"] += 1
        self.reissued += 1
        self.issued += 1
        new = Issue(old.index, old.epoch, old.sample, old.attempt + 1)
        self.in_flight[new.uid] = new
        return new

    def score(self, uid: str) -> None:
        self.scored[uid] = self._take(self.in_flight, uid)

    def train(self, uid: str) -> None:
        self._take(self.scored, uid)
        self.trained += 1

    def drop(self, uid: str, reason: str, length: int | None = None) -> None:
        """Ends an issue without training on it; `length` (sampled tokens) is counted in powers of two."""
        self._take(self.in_flight if uid in self.in_flight else self.scored, uid)
        self.dropped[reason] += 1
        if length is not None:
            self.dropped_by_length[f"<{1 << max(0, length).bit_length()}"] += 1

    def _take(self, place: dict[str, Issue], uid: str) -> Issue:
        if uid not in place:
            raise MismatchError(f"ledger: {uid} is not where it should be (ended twice, or never issued)")
        return place.pop(uid)

    def state(self) -> dict[str, Any]:
        """Plain JSON. Taken between steps: what is in flight is not trained, and is issued again after a rollback."""
        self.check()
        open_prompts = {(i.epoch, i.index) for i in (*self.in_flight.values(), *self.scored.values())}
        if open_prompts:
            raise MismatchError(f"ledger committed with {len(open_prompts)} prompts still open: finish the step first")
        return {
            "seed": self.seed,
            "size": self.size,
            "cursor": self.cursor,
            "issued": self.issued,
            "trained": self.trained,
            "dropped": dict(self.dropped),
            "dropped_by_length": dict(self.dropped_by_length),
            "reissued": self.reissued,
        }

    @classmethod
    def restore(cls, state: dict[str, Any]) -> Ledger:
        counters = {key: Counter(state[key]) for key in ("dropped", "dropped_by_length")}
        return cls(**{**state, **counters})


def _permuted(place: int, size: int, key: str) -> int:
    """A bijection of range(size) chosen by `key`, without storing a permutation (Feistel network, cycle walking)."""
    bits = max(2, (size - 1).bit_length())
    half = (bits + 1) // 2
    low = (1 << half) - 1
    while True:
        left, right = place >> half, place & low
        for turn in range(4):
            digest = hashlib.blake2b(f"{key}/{turn}/{right}".encode(), digest_size=8).digest()
            left, right = right, left ^ (int.from_bytes(digest, "big") & low)
        place = (left << half) | right
        if place < size:
            return place
