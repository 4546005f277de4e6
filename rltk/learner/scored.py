"""What the scored groups say of each sequence, before any of them is sharded: advantages, pass rates, lengths."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch

from rltk.algorithms import Objective, valid_groups
from rltk.learner.packing import RaggedBatch


@dataclass(frozen=True)
class Verdict:
    value: float | None
    correct: bool | None
    flawed: bool | None


@dataclass(frozen=True)
class ScoredSample:
    """What an objective's `shape_rewards` reads of a sample."""

    reward: Verdict
    length: int


def advantages(objective: Objective, batch: RaggedBatch) -> tuple[torch.Tensor, np.ndarray]:
    """Advantages [B] of the whole batch, and the numbers of the sequences to learn from."""
    reward = torch.full((len(batch.reward),), torch.nan)
    samples = _samples(batch)
    for members in _groups(batch):
        shaped = objective.shape_rewards([samples[i] for i in members])
        reward[torch.from_numpy(members)] = torch.tensor([math.nan if v is None else float(v) for v in shaped])
    group = torch.from_numpy(batch.group)
    valid = torch.isfinite(reward) & torch.from_numpy(batch.masked_lengths > 0)
    kept = valid_groups(group, valid, objective.min_group)
    return objective.advantages(torch.nan_to_num(reward), group, valid), kept.nonzero()[:, 0].numpy()


def advantage_by_verdict(batch: RaggedBatch, advantage: torch.Tensor, kept: np.ndarray) -> dict[str, float]:
    """Mean advantage of the sequences that are learned from, by what was said of them: `advantage/sound` and
    `advantage/flawed` of right answers (one that nobody checked counts as sound), `advantage/wrong`. Under FAPO that of
    the flawed ones is positive in a group whose wrong answers outnumber the sound ones, and negative after that has
    turned: `advantage/flawed_positive` is the share of flawed ones for which it has not."""
    right, flawed = batch.correct == 1, batch.flawed == 1
    kinds = {"sound": right & ~flawed, "flawed": right & flawed, "wrong": batch.correct == 0}
    learned = np.zeros(len(batch.reward), bool)
    learned[kept] = True
    found = {kind: advantage.numpy()[of & learned] for kind, of in kinds.items()}
    means = {f"advantage/{kind}": float(values.mean()) for kind, values in found.items() if values.size}
    flawed_ones = found["flawed"]
    return means | ({"advantage/flawed_positive": float((flawed_ones > 0).mean())} if flawed_ones.size else {})


def sequence_columns(batch: RaggedBatch) -> dict[str, torch.Tensor]:
    """`reward`, `pass_rate`, `group_length`, each fp32 [B], of whole groups as they were scored (not as shaped).

    pass_rate is k/n: n samples of the group have a reward, k of them are right, by their verdict where there is one,
    else by a reward above 0. group_length is the mean number of sampled tokens of those k; infinite if k is 0. In a
    group without any reward, of which nothing is learned, they are 0 and infinite.
    """
    scored = np.isfinite(batch.reward)
    right = scored & np.where(batch.correct < 0, np.nan_to_num(batch.reward) > 0, batch.correct == 1)
    pass_rate = np.zeros(len(batch.reward), np.float32)
    group_length = np.full(len(batch.reward), np.inf, np.float32)
    for members in _groups(batch):
        if right[members].any():
            pass_rate[members] = right[members].sum() / scored[members].sum()
            group_length[members] = batch.masked_lengths[members][right[members]].mean()
    columns = {"reward": batch.reward, "pass_rate": pass_rate, "group_length": group_length}
    return {name: torch.from_numpy(np.asarray(column, np.float32)) for name, column in columns.items()}


def _groups(batch: RaggedBatch) -> list[np.ndarray]:
    """Sequence numbers of each group."""
    return [np.flatnonzero(batch.group == g) for g in np.unique(batch.group)]


def _samples(batch: RaggedBatch) -> list[ScoredSample]:
    def label(value: np.int8) -> bool | None:
        return None if value < 0 else bool(value)

    return [
        ScoredSample(Verdict(None if np.isnan(r) else float(r), label(c), label(f)), int(n))
        for r, c, f, n in zip(batch.reward, batch.correct, batch.flawed, batch.masked_lengths, strict=True)
    ]
