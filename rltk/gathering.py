"""Filling a training step: issue prompts, roll them out, keep the groups that the objective admits, issue more.

    prompts --issue--> in flight --roll--> scored --admit--> the step's batch
       ^                  |                   |
       |                  +- broken sample    +- not admitted: as many new prompts, `batch.refills` times at most
       +------------------------------------------+

No Ray here: whoever calls says how jobs are rolled out.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from rltk.algorithms import Objective
from rltk.config import Batch
from rltk.errors import MismatchError
from rltk.genrm_metrics import unjudged
from rltk.ledger import Ledger
from rltk.prompting import Prompting
from rltk.rollout.worker import RolloutResult
from rltk.tasks import Task
from rltk.trajectory import Record, Trajectory

Roll = Callable[[dict[str, Record]], RolloutResult]  # rolls out what the ledger has in flight; records by group


@dataclass
class Gathered:
    """What a step sampled, in the order of issue. `admitted` is scored in the ledger; the rest has ended there."""

    admitted: list[Trajectory] = field(default_factory=list)
    refused: list[Trajectory] = field(default_factory=list)  # of groups that were not admitted
    failed: dict[str, str] = field(default_factory=dict)  # uid -> why the sample could not be used
    records: dict[str, Record] = field(default_factory=dict)  # by group
    refills: int = 0

    @property
    def sampled(self) -> list[Trajectory]:
        return [*self.admitted, *self.refused]

    def permute_rewards(self, seed: int) -> None:
        """The control: rewards dealt out anew over the whole batch, so that they say nothing about the sample."""
        order = np.random.default_rng(seed).permutation(len(self.admitted))
        dealt = [self.admitted[other].reward for other in order]
        self.admitted = [replace(t, reward=reward) for t, reward in zip(self.admitted, dealt, strict=True)]

    def failures(self) -> Iterator[str]:
        """Lines for people about samples that are of no use."""
        unknown = [t.reward.reason for t in self.sampled if t.reward is not None and t.reward.value is None]
        told = {"unusable": list(self.failed.values()), "without a reward, and left out,": unknown}
        for what, reasons in told.items():
            if reasons:
                yield f"{len(reasons)} samples {what} first: {reasons[0]}"
        if line := unjudged(self.sampled):
            yield line

    @property
    def refused_share(self) -> float:
        """Groups that were not admitted, of those that came back."""
        groups = len({t.group_id for t in self.sampled})
        return len({t.group_id for t in self.refused}) / groups if groups else 0.0


def gather(
    batch: Batch, task: Task, ledger: Ledger, prompting: Prompting, objective: Objective, roll: Roll
) -> Gathered:
    """A step's samples: `batch.prompts` admitted groups, or what there is after `batch.refills` refills.

    Raises MismatchError if `roll` loses a sample.
    """
    gathered = Gathered()
    wanted = batch.prompts
    while True:
        issues = ledger.issue_problems(prompting.draw(ledger, wanted), batch.samples)
        records = {issue.group: task.problem(issue.index) for issue in issues}
        gathered.records |= records
        groups = _account(roll(records), ledger, gathered)
        indices = {issue.group: issue.index for issue in issues}
        wanted = 0
        for name, group in groups.items():
            prompting.observe(indices[name], records[name], group)
            if _admitted(objective, group):
                gathered.admitted += group
                continue
            wanted += 1
            gathered.refused += group
            for trajectory in group:
                ledger.drop(trajectory.uid, "not admitted", trajectory.length)
        if not wanted or gathered.refills == batch.refills:
            return gathered
        gathered.refills += 1


def _account(rolled: RolloutResult, ledger: Ledger, gathered: Gathered) -> dict[str, list[Trajectory]]:
    """Enter what came back into the ledger; samples that cannot be used end here. Returns the groups, in order."""
    for uid in rolled.failed:
        ledger.drop(uid, "broken sample")
    gathered.failed |= rolled.failed
    groups: dict[str, list[Trajectory]] = defaultdict(list)
    for trajectory in rolled.trajectories:
        ledger.score(trajectory.uid)
        groups[trajectory.group_id].append(trajectory)
    if lost := list(ledger.in_flight):
        raise MismatchError(f"{len(lost)} samples never came back: {lost[:3]}")
    return groups


def _admitted(objective: Objective, group: Sequence[Trajectory]) -> bool:
    """A group nobody could score is not the objective's to judge, nor would another prompt mend what failed: it goes on
    to the learner, which leaves it out for its own reason."""
    scored = [t for t in group if t.reward is not None and t.reward.value is not None]
    return not scored or objective.admit(scored)
