"""The learner's batches: split without loss, packed without mixing."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rltk.errors import MismatchError
from rltk.learner.packing import RaggedBatch, balance, micro_batches, minibatches, pack, ragged
from rltk.trajectory import RewardRecord, Segment, Trajectory

LENGTHS = st.lists(st.integers(2, 60), min_size=1, max_size=40)


@given(LENGTHS, st.integers(1, 5), st.integers(2, 100))
def test_every_sequence_runs_once_whatever_the_ranks_and_the_budget(lengths, ranks, budget):
    lengths = np.asarray(lengths)
    parts = balance(lengths, ranks)
    assert sorted(p for part in parts for p in part) == list(range(len(lengths)))
    load = [lengths[part].sum() for part in parts if part]
    assert max(load) - min(lengths[part].sum() for part in parts) <= lengths.max()
    for part in parts:
        cut = micro_batches(lengths, part, budget)
        assert [p for micro in cut for p in micro] == part
        assert all(lengths[micro].sum() <= max(budget, lengths[micro].max()) for micro in cut)


@given(st.integers(1, 50), st.integers(1, 8), st.integers(0, 1000))
def test_minibatches_partition_and_repeat_by_seed(count, parts, seed):
    kept = np.arange(100, 100 + count)
    cut = minibatches(kept, parts, seed)
    assert sorted(np.concatenate(cut)) == list(kept)
    assert max(map(len, cut)) - min(map(len, cut)) <= 1
    assert all((a == b).all() for a, b in zip(cut, minibatches(kept, parts, seed), strict=True))


@settings(max_examples=50)
@given(st.lists(st.tuples(st.integers(1, 6), st.integers(0, 9)), min_size=1, max_size=6), st.randoms())
def test_packed_places_lead_back_to_their_tokens(sizes, random):
    rows = []
    for prompt, sampled in sizes:
        mask = np.asarray([False] * prompt + [random.random() < 0.7 for _ in range(sampled)])
        rows.append((np.asarray([random.randrange(1000) for _ in mask]), mask))
    packed = pack(rows)
    flat = torch.cat([torch.as_tensor(ids) for ids, _ in rows])
    padded = packed.ids[0][packed.pad_index]
    assert torch.equal(padded.flatten()[packed.flat_index], flat)
    # a row holds its own sequence first, so that causal attention over it never sees another one
    for number, (ids, _) in enumerate(rows):
        assert padded[number, : len(ids)].tolist() == ids.tolist()
        assert packed.positions[0][packed.flat_index // padded.shape[1] == number].tolist() == list(range(len(ids)))
    table = packed.table(packed.target.float(), fill=-1.0)
    for number, (ids, mask) in enumerate(rows):
        expected = [float(i) if m else -1.0 for i, m in zip(ids[1:], mask[1:], strict=True)]
        assert table[number, : len(expected)].tolist() == expected
    vectors = torch.stack([packed.target.float(), -packed.target.float()], dim=1)
    assert torch.equal(packed.table(vectors, fill=-1.0)[..., 0], table)
    assert torch.equal(packed.ids[0][packed.predict + 1], packed.target)


def trajectory(uid, group, reward, sampled=(5, 6)):
    segments = (
        Segment("prompt", np.asarray([1, 2])),
        Segment("model", np.asarray(sampled), -np.ones(len(sampled)), (0, 0), "stop"),
        Segment("tool", np.asarray([9])),
        Segment("model", np.asarray([7]), np.asarray([-2.0]), (0, 0), "stop"),
    )
    return Trajectory(uid, "p", group, segments, reward=reward)


def test_trajectories_become_ragged_with_unknowns_kept_unknown():
    batch = ragged([
        trajectory("a", "g1", RewardRecord(1.0, correct=True, flawed=False)),
        trajectory("b", "g2", RewardRecord(None, "timeout")),
        trajectory("c", "g1", RewardRecord(0.0, correct=False), sampled=(5, 6, 7)),
    ])  # fmt: skip
    assert batch.offsets.tolist() == [0, 6, 12, 19]
    assert batch.masked_lengths.tolist() == [3, 3, 4]
    assert np.isnan(batch.reward).tolist() == [False, True, False]
    assert batch.group.tolist() == [0, 1, 0]
    assert batch.correct.tolist() == [1, -1, 0] and batch.flawed.tolist() == [0, -1, -1]
    assert np.isnan(batch.mu[~batch.mask]).all() and (batch.mu[batch.mask] < 0).all()


def test_a_batch_that_does_not_line_up_is_refused():
    good = ragged([trajectory("a", "g", RewardRecord(1.0))])
    fields = vars(good)
    with pytest.raises(MismatchError, match="without a finite log-prob"):
        RaggedBatch(**{**fields, "mu": np.full_like(good.mu, np.nan)})
    with pytest.raises(MismatchError, match="nothing predicts it"):
        RaggedBatch(**{**fields, "mask": np.ones_like(good.mask), "mu": np.zeros_like(good.mu)})
    with pytest.raises(MismatchError, match="entries of reward"):
        RaggedBatch(**{**fields, "reward": np.zeros(3)})
    with pytest.raises(MismatchError, match="unscored"):
        ragged([trajectory("a", "g", None)])
