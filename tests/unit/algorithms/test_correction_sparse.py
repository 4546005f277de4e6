"""Sparse-RL's correction: truncate, normalise over all ranks, mask, veto, and the two denominators."""

import math

import pytest
import torch

from rltk.algorithms import Totals, build_correction, build_objective
from tests.unit.algorithms import properties
from tests.unit.algorithms.correction_properties import check_correction
from tests.unit.algorithms.tables import gradient, make_batch, random_batch


def batch_of(ratios, mask=None):
    old = torch.tensor(ratios).double().log()
    return make_batch(old, old, torch.ones(len(old)).double(), mu=torch.zeros_like(old), mask=mask)


def test_truncated_then_normalised_then_masked():
    batch = batch_of([[0.4, 0.6, 1.4, 1.6], [1.0, 1.0, 1.0, 9.0]])
    correction = build_correction("sparse")
    correction.prepare(batch, lambda value: value)
    weight, kept = correction(batch)
    mean = (0.4 + 0.6 + 1.4 + 1.5 + 3.0 + 1.5) / 8
    expected = torch.tensor([[0.4, 0.6, 1.4, 1.5], [1.0, 1.0, 1.0, 1.5]]).double() / mean
    torch.testing.assert_close(weight, expected)
    torch.testing.assert_close(weight.mean().item(), 1.0)  # over the original mask, before anything is dropped
    assert kept.tolist() == [[False, True, True, False], [True, True, True, False]]


def test_the_mean_is_over_sampled_tokens_of_all_ranks():
    batch = random_batch(0, ratio=0.4)
    objectives = [build_objective("grpo", correction=build_correction("sparse")) for _ in range(2)]
    properties.prepare_on_ranks(objectives, [batch.select(slice(0, 2)), batch.select(slice(2, 6))])
    weights = [o.correction(batch)[0] for o in objectives]
    truncated = (batch.old - batch.mu).exp().clamp(max=1.5)
    for weight in weights:
        torch.testing.assert_close(weight[batch.mask], truncated[batch.mask] / truncated[batch.mask].mean())


def test_before_prepare_the_batch_is_the_whole_and_prepare_is_held():
    first, second = random_batch(1, ratio=0.4), random_batch(2, ratio=0.4)
    unprepared, prepared = build_correction("sparse"), build_correction("sparse")
    prepared.prepare(first, lambda value: value)
    assert torch.equal(unprepared(first)[0], prepared(first)[0])
    assert not torch.equal(unprepared(second)[0], prepared(second)[0])
    prepared.prepare(second, lambda value: value)
    assert torch.equal(unprepared(second)[0], prepared(second)[0])


@pytest.mark.parametrize(("ratio", "vetoed"), [(0.9e-4, True), (1.1e-4, False)])
def test_one_impossible_token_drops_its_sequence(ratio, vetoed):
    batch = batch_of([[1.0, 1.0, ratio], [1.0, 1.0, 1.0]])
    _, kept = build_correction("sparse")(batch)
    assert kept.tolist() == [[not vetoed, not vetoed, False], [True, True, True]]
    behind_a_mask = batch_of([[1.0, 1.0, ratio]], mask=torch.tensor([[1, 1, 0]]))
    assert build_correction("sparse")(behind_a_mask)[1][0, :2].all()


def test_a_batch_from_a_full_cache_is_unchanged():
    """No ratio outside the band and mean 1: the loss with it is that of the plain importance weights."""
    batch = batch_of([[0.9, 1.1, 1.2], [0.8, 1.0, 1.0]])
    corrected = build_objective("grpo", correction=build_correction("sparse"))
    weighted = build_objective("grpo", correction=build_correction("tis"))
    torch.testing.assert_close(gradient(corrected, batch), gradient(weighted, batch))
    assert corrected.loss(batch)[1]["correction/tokens"] == 0


def test_denominators():
    """all: a sequence's length is what it was; kept: what is left of it. A vetoed sequence counts either way."""
    batch = batch_of([[1.0, 1.0, 0.1, 0.1], [1.0, 1.0, 1.0, 1e-5], [1.0, 1.0, 1.0, 1.0]])
    mean = (2 + 0.2 + 3 + 1e-5 + 4) / 12
    for denominator, lengths in (("all", (4, 4)), ("kept", (2, 4))):
        correction = build_correction("sparse", denominator=denominator)
        objective = build_objective("grpo", correction=correction)
        first, last = -1 / mean / 3 / lengths[0], -1 / mean / 3 / lengths[1]
        expected = torch.tensor([[first, first, 0, 0], [0, 0, 0, 0], [last] * 4]).double()
        torch.testing.assert_close(gradient(objective, batch), expected)
        totals = build_objective("grpo", aggregation="token-mean", correction=correction)
        assert totals.loss(batch)[0].item() == pytest.approx(-6 / mean / 12)


def test_the_edges_belong_to_the_band():
    batch = batch_of([[1.0, 1.0]])
    correction = build_correction("sparse", low=1.0, high=1.0, veto=1.0)
    assert correction(batch)[1].all()
    assert build_objective("grpo", correction=correction).loss(batch)[1]["correction/tokens"] == 0


def test_dropped_tokens_are_reported():
    batch = batch_of([[1.0, 0.4, 1.0, 1.0], [1.0, 1.0, 1.0, 1.0]])
    metrics = build_objective("grpo", correction=build_correction("sparse")).loss(batch)[1]
    assert metrics["correction/tokens"].item() == pytest.approx(1 / 8)
    assert metrics["correction/sequences"].item() == pytest.approx(1 / 2)


def test_a_micro_batch_of_padding_has_a_gradient_of_zero():
    batch = batch_of([[2.0, 2.0]], mask=torch.zeros(1, 2))
    objective = build_objective("grpo", correction=build_correction("sparse"))
    assert torch.equal(gradient(objective, batch, Totals(10, 2, 5)), torch.zeros(1, 2).double())
    assert torch.equal(build_correction("sparse")(batch)[0], torch.ones(1, 2).double())
    one_token = batch_of([[1.2, 9.0]], mask=torch.tensor([[1, 0]]))
    assert build_correction("sparse")(one_token)[0][0, 0].item() == pytest.approx(1.0)


@pytest.mark.parametrize("denominator", ["all", "kept"])
def test_what_holds_for_every_correction(denominator):
    check_correction("sparse", ratio=0.3, denominator=denominator)


def test_defaults_and_ranges():
    correction = build_correction("sparse")
    assert (correction.low, correction.high, correction.veto, correction.denominator) == (0.5, 1.5, 1e-4, "all")
    assert type(correction).batch_statistic and math.isclose(correction.veto, 0.0001)
    with pytest.raises(ValueError, match="denominator='some' .*one of all, kept"):
        build_correction("sparse", denominator="some")
