"""SAPO: the gate's value and slope, its two temperatures, and that nothing is clipped."""

import math
from dataclasses import replace

import pytest
import torch

from rltk.algorithms import Totals, build_objective
from tests.unit.algorithms import properties
from tests.unit.algorithms.tables import gradient, make_batch, random_batch

RATIOS = [0.05, 0.7, 1.0, 1.6, 8.0]


def formula(ratio, advantage, tau_positive=1.0, tau_negative=1.05):
    """(loss, d loss / d new) of one token."""
    tau = tau_positive if advantage > 0 else tau_negative
    value = 4 / tau / (1 + math.exp(-tau * (ratio - 1)))
    slope = 1 / math.cosh(tau * (ratio - 1) / 2) ** 2
    return -value * advantage, -advantage * ratio * slope


@pytest.mark.parametrize("options", [{}, {"tau_positive": 3.0, "tau_negative": 0.5}])
@pytest.mark.parametrize("advantage", [2.0, -1.5])
@pytest.mark.parametrize("ratio", RATIOS)
def test_one_token(ratio, advantage, options):
    old = torch.full((1, 1), -1.0).double()
    batch = make_batch(old + math.log(ratio), old, torch.tensor([advantage]).double())
    objective = build_objective("sapo", **options)
    loss, slope = formula(ratio, advantage, **options)
    assert objective.loss(batch)[0].item() == pytest.approx(loss, rel=1e-12)
    assert gradient(objective, batch).item() == pytest.approx(slope, rel=1e-12)


def test_against_the_formula_on_a_batch():
    batch = random_batch(0, ratio=0.6)
    objective = build_objective("sapo", aggregation="token-sum")
    slopes, total = torch.zeros(6, 7).double(), 0.0
    for row, t in batch.mask.nonzero().tolist():
        ratio = math.exp((batch.new - batch.old)[row, t].item())
        loss, slope = formula(ratio, batch.advantage[row].item())
        total, slopes[row, t] = total + loss, slope
    assert objective.loss(batch)[0].item() == pytest.approx(total, rel=1e-12)
    torch.testing.assert_close(gradient(objective, batch), slopes, rtol=1e-10, atol=1e-12)


def test_every_token_keeps_some_gradient_and_wrong_ones_less():
    ratio = torch.tensor([RATIOS]).double()
    old = torch.full_like(ratio, -3.0)
    right, wrong = (
        gradient(build_objective("sapo"), make_batch(old + ratio.log(), old, torch.tensor([a]).double()))
        for a in (1.0, -1.0)
    )
    assert (right < 0).all() and (wrong > 0).all()
    beyond = ratio != 1
    assert (right.abs() > wrong.abs())[beyond].all() and right[~beyond] == -wrong[~beyond]


def test_it_reports_the_slope():
    old = torch.full((1, 2), -1.0).double()
    batch = make_batch(old + torch.tensor([[0.0, math.log(3.0)]]).double(), old, torch.ones(1).double())
    for advantage, tau in ((1.0, 1.0), (-1.0, 1.05), (0.0, 1.05)):
        metrics = build_objective("sapo").loss(replace(batch, advantage=torch.tensor([advantage]).double()))[1]
        assert metrics["gate/slope"].item() == pytest.approx((1 + 1 / math.cosh(tau) ** 2) / 2)


def test_clip_options_are_without_effect():
    batch = random_batch(1, ratio=0.8)
    clipped = build_objective("sapo", clip_low=0.01, clip_high=0.01, dual_clip=1.01)
    assert torch.equal(gradient(clipped, batch), gradient(build_objective("sapo"), batch))


def test_finite_differences():
    batch = random_batch(2, ratio=0.5)
    objective, totals = build_objective("sapo"), Totals.of(batch.mask)
    slopes = gradient(objective, batch)
    for row, t in batch.mask.nonzero().tolist()[::4]:
        move = torch.zeros(6, 7).double()
        move[row, t] = 1e-6
        up, down = (objective.loss(replace(batch, new=batch.new + sign * move), totals)[0] for sign in (1, -1))
        assert ((up - down) / 2e-6).item() == pytest.approx(slopes[row, t].item(), abs=1e-7)


def test_against_the_sampler():
    batch = random_batch(3)
    expected = build_objective("sapo").loss(replace(batch, old=batch.mu))[0]
    torch.testing.assert_close(build_objective("sapo", reference="mu").loss(batch)[0], expected)


def test_what_holds_for_every_objective():
    objective, batch = build_objective("sapo"), properties.filled_batch(4, padding=True)
    properties.check_on_policy(objective, batch, batch.advantage[:, None])
    properties.check_masked_tokens(objective, batch)
    properties.check_order(objective, batch)
    properties.check_equal_rewards(objective, batch)
    properties.check_extremes(objective)
    properties.check_splits(lambda: build_objective("sapo"), batch, [2, 2], [1, 4])


def test_the_configuration_and_its_values():
    properties.check_configuration("sapo")
    objective = build_objective("sapo")
    assert (objective.tau_positive, objective.tau_negative) == (1.0, 1.05)
    assert objective.aggregation == "seq-mean-token-mean" and objective.beta == 0 and objective.needs == frozenset()
    with pytest.raises(ValueError, match="tau_positive=0.0 .*a number > 0"):
        build_objective("sapo", tau_positive=0.0)
