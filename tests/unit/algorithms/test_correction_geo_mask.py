"""Geometric rejection: the mean log-ratio, its band, whole sequences."""

import math

import pytest
import torch

from rltk.algorithms import build_correction, build_objective
from tests.unit.algorithms.correction_properties import check_correction
from tests.unit.algorithms.tables import gradient, make_batch, random_batch


@pytest.mark.parametrize(
    ("mean", "stays"), [(0.0, True), (0.00099, True), (0.00101, False), (-0.00099, True), (-0.00101, False)]
)
def test_the_band_is_around_the_mean_log_ratio(mean, stays):
    """log .999 = -.0010005, log 1.001 = .0009995; the spread within the sequence does not matter."""
    spread = torch.tensor([[0.5, -0.2, -0.3, 0.0]]).double()
    old = torch.full((1, 4), -1.0).double()
    batch = make_batch(old, old, torch.ones(1).double(), mu=old - mean - spread)
    weight, kept = build_correction("geo_mask")(batch)
    assert kept.tolist() == [[stays] * 4] and torch.equal(weight, torch.ones(1, 4).double())


@pytest.mark.parametrize(("mean", "stays"), [(-0.6, True), (-0.7, False), (0.6, True), (0.7, False)])
def test_the_band_is_of_ratios(mean, stays):
    old = torch.full((1, 2), -1.0).double()
    batch = make_batch(old, old, torch.ones(1).double(), mu=old - mean)
    assert build_correction("geo_mask", low=0.5, high=2.0)(batch)[1].all().item() is stays  # log 2 = .69


def test_the_edges_belong_to_the_band():
    old = torch.full((1, 2), -1.0).double()
    batch = make_batch(old, old, torch.ones(1).double())
    assert build_correction("geo_mask", low=1.0, high=1.0)(batch)[1].all()


def test_the_mean_is_over_sampled_tokens():
    batch = random_batch(0, ratio=0.2)
    _, kept = build_correction("geo_mask", low=0.95, high=1.05)(batch)
    for row in range(6):
        mean = (batch.old - batch.mu)[row, batch.mask[row]].mean().item()
        assert kept[row].tolist() == [math.log(0.95) <= mean <= math.log(1.05)] * 7
    assert 0 < kept[:, 0].sum() < 6


def test_a_dropped_sequence_has_no_gradient_and_still_counts():
    old = torch.full((2, 3), -1.0).double()
    batch = make_batch(old, old, torch.ones(2).double(), mu=torch.stack([old[0], old[1] + 0.01]))
    for aggregation, count in (("token-mean", 6), ("seq-mean-token-mean", 6)):
        objective = build_objective("grpo", aggregation=aggregation, correction=build_correction("geo_mask"))
        expected = torch.tensor([[-1 / count] * 3, [0.0] * 3]).double()
        torch.testing.assert_close(gradient(objective, batch), expected)
    metrics = objective.loss(batch)[1]
    assert metrics["correction/tokens"].item() == 0.5 and metrics["correction/sequences"].item() == 0.5


def test_what_holds_for_every_correction():
    check_correction("geo_mask", ratio=0.2, low=0.93, high=1.08)


def test_defaults_and_ranges():
    correction = build_correction("geo_mask")
    assert (correction.low, correction.high) == (0.999, 1.001)
    for options in ({"low": 0.0}, {"low": 1.01}, {"high": 0.99}):
        with pytest.raises(ValueError, match="GeometricMask: option (low|high)"):
            build_correction("geo_mask", **options)
