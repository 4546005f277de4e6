"""Which prompts are sampled next: the task's order, or an objective's weights over their accuracy so far."""

from __future__ import annotations

import reprlib
from collections.abc import Sequence
from typing import Any

import numpy as np

from rltk.algorithms.prompts import PromptSampler
from rltk.errors import RltkError
from rltk.ledger import Ledger
from rltk.tasks import Task
from rltk.trajectory import Record, Trajectory

CANDIDATES = 4  # of an endless task, for each prompt that is wanted: so much is there to choose from


class Prompting:
    """`sampler` None: the task's order, and nothing is remembered.

    With a sampler, each prompt of a finite task has a running mean of its accuracy and any may come next; an endless
    task has one for each level, and the prompts are chosen among the next candidates of its order. A choice is without
    replacement and a function of (run seed, ledger's cursor, means): a resumed run makes the same one.
    """

    def __init__(self, task: Task, sampler: PromptSampler | None, seed: int) -> None:
        self.task, self.sampler, self.seed = task, sampler, seed
        self.means: dict[int | str, float] = {}  # by problem index (finite tasks) or level (endless ones)
        self.visits: dict[int, int] = {}  # finite tasks: how often a problem was issued, which is its epoch

    def draw(self, ledger: Ledger, prompts: int) -> list[tuple[int, int]]:
        """(index, epoch) of the next `prompts` prompts, for `ledger.issue_problems`."""
        if self.sampler is None:
            return ledger.draw(prompts)
        generator = np.random.default_rng([self.seed, ledger.cursor])
        if self.task.size is None:
            candidates = ledger.draw(CANDIDATES * prompts)
            levels = [self.task.problem(index).level for index, _ in candidates]
            return [candidates[place] for place in sorted(self._choose(levels, prompts, generator))]
        ledger.draw(prompts)  # the next choice has another cursor, and with it another seed
        chosen: list[int] = []
        while len(chosen) < prompts:  # a task smaller than the batch is gone through several times
            chosen += self._choose(range(self.task.size), min(self.task.size, prompts - len(chosen)), generator)
        return [(index, self._visit(index)) for index in chosen]

    def observe(self, index: int, record: Record, group: Sequence[Trajectory]) -> None:
        """Learn from the samples of one prompt; those without a reward say nothing."""
        found = accuracy(group)
        if self.sampler is None or found is None:
            return
        key = record.level if self.task.size is None else index
        self.means[key] = self.sampler.update(self.means.get(key, self.sampler.start), found)

    def state(self) -> dict[str, Any]:
        """Plain JSON, whose keys are strings."""
        return {
            "means": {str(key): mean for key, mean in self.means.items()},
            "visits": {str(index): count for index, count in self.visits.items()},
        }

    def restore(self, state: dict[str, Any]) -> None:
        key = str if self.task.size is None else int
        self.means = {key(name): mean for name, mean in state["means"].items()}
        self.visits = {int(index): count for index, count in state["visits"].items()}

    def _visit(self, index: int) -> int:
        self.visits[index] = self.visits.get(index, 0) + 1
        return self.visits[index] - 1

    def _choose(self, keys: Sequence[int | str], count: int, generator: np.random.Generator) -> list[int]:
        """`count` places in `keys`, by weight, without replacement; weight 0 only when nothing else is left."""
        assert self.sampler is not None
        means = [self.means.get(key, self.sampler.start) for key in keys]
        weights = np.asarray(self.sampler.weights(means), dtype=np.float64)
        if weights.shape != (len(means),) or not np.isfinite(weights).all() or (weights < 0).any():
            raise RltkError(
                f"{type(self.sampler).__name__}.weights gave {reprlib.repr(weights.tolist())} for {len(means)} "
                "accuracies. Fix: return one finite weight of at least 0 for each."
            )
        # The `count` largest of log(weight) + Gumbel noise are a draw by weight without replacement (arXiv 1903.06059).
        with np.errstate(divide="ignore"):
            scores = np.log(weights) - np.log(-np.log(generator.random(len(weights))))
        return [int(place) for place in np.argsort(-scores, kind="stable")[:count]]


def accuracy(group: Sequence[Trajectory]) -> float | None:
    """Share of right answers among the scored samples; where nobody says what is right, a reward above 0 is."""
    rewards = [t.reward for t in group if t.reward is not None and t.reward.value is not None]
    right = [r.value > 0 if r.correct is None else r.correct for r in rewards if r.value is not None]
    return sum(right) / len(right) if right else None
