"""From problems to scored samples of a stack, in numpy; and a run's samples in the learner's own form."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from rltk.algorithms import Objective
from rltk.lab.sampler import Samples
from rltk.learner.packing import RaggedBatch
from rltk.learner.scored import ScoredSample, Verdict
from rltk.ledger import Ledger
from rltk.rollout.tokens import render_prompt
from rltk.tasks import Task
from rltk.trajectory import Record, RewardRecord


@dataclass(frozen=True)
class Rolled:
    """One training batch of every run: `[R][B]` lists and the samples."""

    records: list[list[Record]]
    prompts: list[list[list[int]]]
    samples: Samples
    rewards: list[list[RewardRecord]]

    def ragged(self, run: int, group_size: int, objective: Objective | None = None) -> RaggedBatch:
        """The batch of one run as the learner takes it; `group_size` neighbours share a prompt.

        In a group that the objective does not admit the rewards are unknown, so that it is left out.
        """
        ids, mask, mu, rewards = [], [], [], self.rewards[run]
        if objective is not None:
            rewards = _admitted(objective, rewards, self.samples.length[run], group_size)
        for row, prompt in enumerate(self.prompts[run]):
            n = int(self.samples.length[run, row])
            ids += [prompt, self.samples.tokens[run, row, :n]]
            mask += [np.zeros(len(prompt), bool), np.ones(n, bool)]
            mu += [np.full(len(prompt), np.nan), self.samples.logprobs[run, row, :n]]
        lengths = [len(p) + int(n) for p, n in zip(self.prompts[run], self.samples.length[run], strict=True)]
        return RaggedBatch(
            ids=np.concatenate(ids).astype(np.int32), mask=np.concatenate(mask),
            mu=np.concatenate(mu).astype(np.float32), offsets=np.cumsum([0, *lengths], dtype=np.int64),
            reward=np.asarray([np.nan if r.value is None else r.value for r in rewards], np.float32),
            group=np.arange(len(rewards)) // group_size,
            correct=np.asarray([_label(r.correct) for r in rewards], np.int8),
            flawed=np.asarray([_label(r.flawed) for r in rewards], np.int8),
        )  # fmt: skip


class Problems:
    """Training problems in the order in which the driver's ledger would issue them, and their prompts' ids."""

    def __init__(self, task: Task, tokenizer: Any, seed: int) -> None:
        self.task, self.tokenizer, self.ledger = task, tokenizer, Ledger(seed, task.size)
        self.seed = seed

    def take(self, prompts: int, samples: int) -> tuple[list[Record], list[list[int]], int]:
        """Records and prompt ids, each `samples` times in a row; and the seed of the whole draw."""
        issues = self.ledger.issue(prompts, 1)
        found = [self._problem(issue.index) for issue in issues]
        for issue in issues:
            self.ledger.score(issue.uid)
            self.ledger.train(issue.uid)
        records = [record for record, _ in found for _ in range(samples)]
        return records, [ids for _, ids in found for _ in range(samples)], issues[0].seed(self.seed)

    def _problem(self, index: int) -> tuple[Record, list[int]]:
        record = self.task.problem(index)
        return record, render_prompt(self.tokenizer, record.messages)


def score(
    task: Task, tokenizer: Any, records: Sequence[Sequence[Record]], samples: Samples
) -> list[list[RewardRecord]]:
    """The task's rule on every sample, `[R][B]`."""
    scored = []
    for run, row_records in enumerate(records):
        ids = [samples.tokens[run, row, : samples.length[run, row]].tolist() for row in range(len(row_records))]
        texts = tokenizer.batch_decode(ids, skip_special_tokens=True)
        scored.append([task.score(record, text) for record, text in zip(row_records, texts, strict=True)])
    return scored


def with_label_errors(rewards: Sequence[RewardRecord], miss: float, alarm: float, seed: int) -> list[RewardRecord]:
    """The rewards as a judge with these error rates would label them: `miss` of the flawed right answers pass for
    sound, `alarm` of the sound ones are called flawed. What nobody labelled stays so."""
    draws = np.random.default_rng(seed).random(len(rewards))
    wrong = [
        r.flawed is not None and draw < (miss if r.flawed else alarm) for r, draw in zip(rewards, draws, strict=True)
    ]
    return [replace(r, flawed=not r.flawed) if w else r for r, w in zip(rewards, wrong, strict=True)]


def _admitted(
    objective: Objective, rewards: list[RewardRecord], lengths: np.ndarray, group_size: int
) -> list[RewardRecord]:
    """The rewards, unknown in groups that the objective does not admit: the lab leaves them out and refills nothing."""
    kept = list(rewards)
    for first in range(0, len(rewards), group_size):
        group = range(first, first + group_size)
        samples = [ScoredSample(Verdict(r.value, r.correct, r.flawed), int(lengths[i])) for i, r in
                   zip(group, rewards[first : first + group_size], strict=True) if r.value is not None]  # fmt: skip
        if not objective.admit(samples):
            for i in group:
                kept[i] = replace(rewards[i], value=None, reason="not admitted")
    return kept


def _label(value: bool | None) -> int:
    return -1 if value is None else int(value)
