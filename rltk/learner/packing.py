"""Ragged batches, their split into minibatches, ranks and micro-batches, and the packed form the model runs on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from rltk.errors import MismatchError
from rltk.trajectory import Trajectory


@dataclass(frozen=True)
class RaggedBatch:
    """Scored trajectories as flat arrays; sequence i is `[offsets[i], offsets[i + 1])`.

    ids int32 [N], mask bool [N] (sampled tokens), mu float32 [N] (NaN where the mask is False: a log-prob that nobody
    recorded must not look like one), offsets int64 [B + 1], reward float32 [B] (NaN: nobody could tell), group int64
    [B], correct and flawed int8 [B] (1 yes, 0 no, -1 nobody checked).
    """

    ids: np.ndarray
    mask: np.ndarray
    mu: np.ndarray
    offsets: np.ndarray
    reward: np.ndarray
    group: np.ndarray
    correct: np.ndarray
    flawed: np.ndarray

    def __post_init__(self) -> None:
        tokens, sequences = int(self.offsets[-1]), len(self.offsets) - 1
        if not len(self.ids) == len(self.mask) == len(self.mu) == tokens:
            raise MismatchError(f"{len(self.ids)} ids, {len(self.mask)} mask, {len(self.mu)} mu for {tokens} tokens")
        for name in ("reward", "group", "correct", "flawed"):
            if len(getattr(self, name)) != sequences:
                raise MismatchError(f"{len(getattr(self, name))} entries of {name} for {sequences} sequences")
        if not np.isfinite(self.mu[self.mask]).all():
            raise MismatchError("a sampled token without a finite log-prob reached the learner")
        if self.mask[self.offsets[:-1]].any():
            raise MismatchError("a sequence begins with a sampled token: nothing predicts it")

    @property
    def lengths(self) -> np.ndarray:
        """int64 [B]: tokens of each sequence, prompt included."""
        return np.diff(self.offsets)

    @property
    def masked_lengths(self) -> np.ndarray:
        """int64 [B]: sampled tokens of each sequence."""
        return np.add.reduceat(self.mask.astype(np.int64), self.offsets[:-1])

    def sequence(self, i: int) -> slice:
        return slice(int(self.offsets[i]), int(self.offsets[i + 1]))


def ragged(trajectories: Sequence[Trajectory]) -> RaggedBatch:
    """The learner's form of scored trajectories, in order."""
    ids, masks, mus, rewards = [], [], [], []
    for trajectory in trajectories:
        if trajectory.reward is None:
            raise MismatchError(f"trajectory {trajectory.uid} reached the learner unscored")
        mask = trajectory.mask
        mu = np.full(len(mask), np.nan, np.float32)
        mu[mask] = trajectory.logprobs
        ids.append(trajectory.ids)
        masks.append(mask)
        mus.append(mu)
        rewards.append(np.nan if trajectory.reward.value is None else trajectory.reward.value)
    labels = [(_label(t.reward.correct), _label(t.reward.flawed)) for t in trajectories if t.reward is not None]
    groups = {name: number for number, name in enumerate(dict.fromkeys(t.group_id for t in trajectories))}
    return RaggedBatch(
        np.concatenate(ids), np.concatenate(masks), np.concatenate(mus),
        np.cumsum([0, *(len(i) for i in ids)], dtype=np.int64), np.asarray(rewards, np.float32),
        np.asarray([groups[t.group_id] for t in trajectories], np.int64),
        np.asarray([c for c, _ in labels], np.int8), np.asarray([f for _, f in labels], np.int8),
    )  # fmt: skip


def _label(value: bool | None) -> int:
    return -1 if value is None else int(value)


def minibatches(kept: np.ndarray, count: int, seed: int) -> list[np.ndarray]:
    """Sequence numbers `kept`, shuffled by `seed`, in `count` near-equal parts (fewer if there are fewer sequences)."""
    order = np.random.default_rng(seed).permutation(kept)
    return [part for part in np.array_split(order, count) if len(part)]


def balance(lengths: np.ndarray, ranks: int) -> list[list[int]]:
    """Positions into `lengths`, one list a rank, longest first to the least loaded: token counts are near equal."""
    load, parts = np.zeros(ranks, np.int64), [[] for _ in range(ranks)]
    for position in np.argsort(-lengths, kind="stable"):
        rank = int(np.argmin(load))
        parts[rank].append(int(position))
        load[rank] += lengths[position]
    return parts


def micro_batches(lengths: np.ndarray, positions: Sequence[int], budget: int) -> list[list[int]]:
    """`positions` (longest first, as `balance` gives them) cut so that each part holds at most `budget` tokens.

    Neighbours are of similar length, which keeps the padding inside attention small. A sequence longer than the budget
    gets a part of its own.
    """
    parts: list[list[int]] = []
    room = 0
    for position in positions:
        if not parts or lengths[position] > room:
            parts.append([])
            room = max(budget, int(lengths[position]))
        parts[-1].append(position)
        room -= int(lengths[position])
    return parts


@dataclass(frozen=True)
class Packed:
    """Sequences laid end to end for one forward, and where their sampled tokens are.

    ids, positions int64 [1, N]; `pad_index` int64 [B, L] takes the flat tokens to padded rows (0 where there is none)
    and `flat_index` int64 [N] takes padded rows back; `predict` int64 [M]: the flat places whose output predicts a
    sampled token; `target` int64 [M]: that token; `row`, `column` int64 [M]: its place in a `[B, T]` table of sampled
    tokens' positions, T the longest sequence's number of tokens after its first.
    """

    ids: torch.Tensor
    positions: torch.Tensor
    pad_index: torch.Tensor
    flat_index: torch.Tensor
    predict: torch.Tensor
    target: torch.Tensor
    row: torch.Tensor
    column: torch.Tensor
    rows: int
    columns: int

    def to(self, device: torch.device) -> Packed:
        moved = {k: v.to(device) if isinstance(v, torch.Tensor) else v for k, v in vars(self).items()}
        return Packed(**moved)

    def table(self, values: torch.Tensor, fill: float = 0.0) -> torch.Tensor:
        """[M] -> [B, T], or [M, d] -> [B, T, d], differentiably; `fill` where nothing was sampled."""
        shape = (self.rows, self.columns, *values.shape[1:])
        out = torch.full(shape, fill, dtype=values.dtype, device=values.device)
        return out.index_put((self.row, self.column), values)


def pack(sequences: Sequence[tuple[np.ndarray, np.ndarray]]) -> Packed:
    """(ids [n], mask [n]) of each sequence -> Packed. Every token but the first may be a target."""
    lengths = np.asarray([len(ids) for ids, _ in sequences], np.int64)
    starts = np.cumsum(np.concatenate([[0], lengths[:-1]]))
    longest = int(lengths.max())
    place = np.arange(longest)[None]
    inside = place < lengths[:, None]
    pad_index = np.where(inside, starts[:, None] + place, 0)
    flat_rows = np.repeat(np.arange(len(lengths)), lengths)
    flat_places = np.concatenate([np.arange(n) for n in lengths])
    ids = np.concatenate([ids for ids, _ in sequences]).astype(np.int64)
    mask = np.concatenate([mask for _, mask in sequences])
    sampled = np.flatnonzero(mask)
    as_tensor = torch.from_numpy
    return Packed(
        ids=as_tensor(ids)[None], positions=as_tensor(flat_places)[None], pad_index=as_tensor(pad_index),
        flat_index=as_tensor(flat_rows * longest + flat_places), predict=as_tensor(sampled - 1),
        target=as_tensor(ids[sampled]), row=as_tensor(flat_rows[sampled]), column=as_tensor(flat_places[sampled] - 1),
        rows=len(lengths), columns=max(longest - 1, 1),
    )  # fmt: skip
