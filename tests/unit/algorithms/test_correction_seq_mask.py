"""Sequence-level masked importance sampling: the product, the drop, and the share by quartile of length."""

import math

import pytest
import torch

from rltk.algorithms import Totals, build_correction, build_objective
from tests.unit.algorithms import properties
from tests.unit.algorithms.correction_properties import check_correction
from tests.unit.algorithms.tables import gradient, make_batch, random_batch


def test_the_weight_is_the_product_over_sampled_tokens():
    batch = random_batch(0, ratio=0.4)
    weight, kept = build_correction("seq_mask")(batch)
    dropped = 0
    for row in range(6):
        product = math.exp((batch.old - batch.mu)[row, batch.mask[row]].sum().item())
        dropped += product > 3
        expected = torch.full((7,), product if product <= 3 else 0.0).double()
        torch.testing.assert_close(weight[row], expected)
        assert kept[row].tolist() == [product <= 3] * 7
    assert 0 < dropped < 6


def test_a_dropped_sequence_has_no_gradient_and_still_counts():
    old = torch.full((2, 3), -1.0).double()
    mu = torch.stack([old[0] - 0.2, old[1] - 0.4])  # products e^.6 = 1.8 and e^1.2 = 3.3
    batch = make_batch(old, old, torch.ones(2).double(), mu=mu)
    for aggregation, count in (("token-mean", 6), ("seq-mean-token-mean", 6), ("seq-mean-token-sum", 2)):
        objective = build_objective("grpo", aggregation=aggregation, correction=build_correction("seq_mask"))
        expected = torch.tensor([[-math.exp(0.6) / count] * 3, [0.0] * 3]).double()
        torch.testing.assert_close(gradient(objective, batch), expected)


def test_small_products_are_kept():
    old = torch.full((1, 4), -1.0).double()
    weight, kept = build_correction("seq_mask")(make_batch(old, old, torch.ones(1).double(), mu=old + 2.0))
    assert kept.all() and weight[0, 0].item() == pytest.approx(math.exp(-8))


@pytest.mark.parametrize(("cap", "stays"), [(1.0, True), (2.1, True), (1.9, False)])
def test_the_cap_is_inclusive(cap, stays):
    old = torch.tensor([[0.0 if cap == 1.0 else math.log(2.0)]]).double()
    _, kept = build_correction("seq_mask", cap=cap)(make_batch(old, old, old[:, 0], mu=torch.zeros(1, 1).double()))
    assert kept.item() is stays


def batch_of_lengths(lengths, dropped):
    """Sequences of these lengths; those in `dropped` have a product of e^2, the others of 1."""
    width = max(lengths)
    mask = torch.arange(width) < torch.tensor(lengths)[:, None]
    old = torch.zeros(len(lengths), width).double()
    mu = old.clone()
    mu[list(dropped), 0] = -2.0
    return make_batch(old, old, torch.ones(len(lengths)).double(), mu=mu, mask=mask)


def shares(batch, cuts=()):
    """dropped_q1 .. dropped_q4 of a step cut into micro-batches at the rows `cuts`."""
    objective = build_objective("grpo", correction=build_correction("seq_mask"))
    objective.prepare(batch)
    totals, edges = Totals.of(batch.mask), [0, *cuts, len(batch.mask)]
    found = [objective.loss(batch.select(slice(a, b)), totals)[1] for a, b in zip(edges, edges[1:], strict=False)]
    return [sum(part[f"correction/dropped_q{q}"].item() for part in found) for q in (1, 2, 3, 4)]


@pytest.mark.parametrize("cuts", [(), (1, 5)])
def test_the_dropped_share_by_quartile_of_length(cuts):
    lengths = [9, 1, 5, 7, 2, 8, 6, 4, 3, 10, 11, 12]  # quartiles end at 3, 6, 9
    dropped = [1, 9, 10, 7]  # lengths 1 (q1), 10 and 11 (q4), 4 (q2)
    assert shares(batch_of_lengths(lengths, dropped), cuts) == pytest.approx([1 / 3, 1 / 3, 0, 2 / 3])


def test_uneven_numbers_ties_and_padding():
    # 5 sequences: at least a quarter of them (2), a half (3), three quarters (4) are no longer than 2, 3, 4
    assert shares(batch_of_lengths([1, 2, 3, 4, 5], [0, 1, 3])) == pytest.approx([1, 0, 1, 0])
    assert shares(batch_of_lengths([4, 4, 4, 4], [0])) == pytest.approx([1 / 4, 0, 0, 0])  # all in the first
    assert shares(batch_of_lengths([0, 1, 2, 3, 4], [0, 1, 4])) == pytest.approx([1, 0, 0, 1])  # a row of padding
    assert shares(batch_of_lengths([0, 3], [1])) == pytest.approx([1, 0, 0, 0])


def test_quartiles_are_those_of_all_ranks():
    batch = batch_of_lengths([1, 2, 3, 4, 5, 6, 7, 8], [0, 5, 7])
    objectives = [build_objective("grpo", correction=build_correction("seq_mask")) for _ in range(2)]
    shards = properties.prepare_on_ranks(objectives, [batch.select(slice(0, 4)), batch.select(slice(4, 8))])
    totals = Totals.of(batch.mask)
    found = [o.loss(shard, totals)[1] for o, shard in zip(objectives, shards, strict=True)]
    merged = [sum(part[f"correction/dropped_q{q}"].item() for part in found) for q in (1, 2, 3, 4)]
    assert merged == pytest.approx([1 / 2, 0, 1 / 2, 1 / 2])


def test_without_prepare_there_are_no_quartiles_but_a_loss():
    metrics = build_objective("grpo", correction=build_correction("seq_mask")).loss(random_batch(1))[1]
    assert "correction/sequences" in metrics and not any("dropped" in name for name in metrics)


def test_a_dropped_sequence_is_touched_whole():
    batch = batch_of_lengths([3, 5], [1])
    metrics = build_objective("grpo", correction=build_correction("seq_mask")).loss(batch)[1]
    assert metrics["correction/tokens"].item() == pytest.approx(5 / 8)
    assert metrics["correction/sequences"].item() == pytest.approx(1 / 2)
    assert metrics["correction/weight"].item() == pytest.approx(3 / 8) and metrics["correction/weight_max"] == 1


def test_what_holds_for_every_correction():
    check_correction("seq_mask", ratio=0.4)


def test_defaults_and_ranges():
    assert build_correction("seq_mask").cap == 3.0
    with pytest.raises(ValueError, match="cap=0.9 .*a number >= 1"):
        build_correction("seq_mask", cap=0.9)


def test_sequences_beyond_the_histogram_count_as_its_longest():
    """Two of eight are longer than it: they are the last quartile, and ranks still sum tables of one size."""
    width = 2**17 + 3
    mask = torch.arange(width) < torch.tensor([1, 2, 3, 4, 5, 6, width - 1, width])[:, None]
    old = torch.zeros(8, width)
    mu = old.clone()
    mu[7, 0] = -2.0
    batch = make_batch(old, old, torch.ones(8), mu=mu, mask=mask)
    assert shares(batch) == pytest.approx([0, 0, 0, 1 / 2])
    objectives = [build_objective("grpo", correction=build_correction("seq_mask")) for _ in range(2)]
    properties.prepare_on_ranks(objectives, [batch.select(slice(0, 4)), batch.select(slice(4, 8))])
    assert objectives[0].loss(batch)[1]["correction/dropped_q4"].item() == pytest.approx(1 / 2)


def test_a_quartile_that_was_empty_in_prepare_is_no_division_by_zero():
    objective = build_objective("grpo", correction=build_correction("seq_mask"))
    objective.prepare(batch_of_lengths([4, 4, 4, 4], []))
    metrics = objective.loss(batch_of_lengths([5, 4], [0]))[1]
    found = {name for name in metrics if "dropped" in name}
    assert found == {f"correction/dropped_q{q}" for q in (1, 2, 3, 4)}
    assert all(metrics[name].isfinite() for name in found)
