"""IcePop: the band, its edges, and what is reported."""

import pytest
import torch

from rltk.algorithms import build_correction, build_objective
from tests.unit.algorithms.correction_properties import check_correction
from tests.unit.algorithms.tables import gradient, make_batch

RATIOS = torch.tensor([[0.49, 0.5, 1.0, 2.0, 5.0, 5.01, 0.01, 90.0]]).double()


def batch_of(ratios, mask=None):
    """old / mu = ratios; old is what makes the band's edges exact."""
    old = ratios.log()
    return make_batch(old, old, torch.ones(len(ratios)).double(), mu=torch.zeros_like(old), mask=mask)


def test_weight_inside_the_band_and_nothing_outside():
    weight, kept = build_correction("icepop")(batch_of(RATIOS))
    inside = torch.tensor([[0, 0, 1, 1, 0, 0, 0, 0]]).bool() | (kept & ((RATIOS == 0.5) | (RATIOS == 5.0)))
    assert torch.equal(kept, inside)
    torch.testing.assert_close(weight, torch.where(kept, RATIOS, 0.0))
    objective = build_objective("grpo", aggregation="token-sum", correction=build_correction("icepop"))
    torch.testing.assert_close(gradient(objective, batch_of(RATIOS)), torch.where(kept, -RATIOS, 0.0))


@pytest.mark.parametrize(("ratio", "stays"), [(0.26, True), (0.24, False), (3.9, True), (4.1, False)])
def test_the_band_is_an_option(ratio, stays):
    _, kept = build_correction("icepop", low=0.25, high=4.0)(batch_of(torch.tensor([[ratio]]).double()))
    assert kept.item() is stays


def test_the_edges_belong_to_the_band():
    one = torch.ones(1, 1).double()
    assert build_correction("icepop", low=1.0)(batch_of(one))[1].item()
    assert build_correction("icepop", high=1.0)(batch_of(one))[1].item()


def test_the_denominator_keeps_the_dropped():
    ratios = torch.tensor([[1.0, 1.0, 9.0, 9.0]]).double()
    for aggregation in ("token-mean", "seq-mean-token-mean"):
        objective = build_objective("grpo", aggregation=aggregation, correction=build_correction("icepop"))
        assert objective.loss(batch_of(ratios))[0].item() == pytest.approx(-2 / 4)


def test_it_reports_what_it_dropped():
    ratios = torch.tensor([[1.0, 9.0, 9.0, 2.0], [1.0, 1.0, 1.0, 9.0]]).double()
    mask = torch.tensor([[1, 1, 0, 1], [1, 1, 1, 0]])
    metrics = build_objective("grpo", correction=build_correction("icepop")).loss(batch_of(ratios, mask))[1]
    assert metrics["correction/tokens"].item() == pytest.approx(1 / 6)
    assert metrics["correction/sequences"].item() == pytest.approx(1 / 2)
    assert metrics["correction/weight"].item() == pytest.approx(6 / 6)  # 1 + 0 + 2 + 1 + 1 + 1
    assert metrics["correction/weight_max"].item() == pytest.approx(2.0)


def test_what_holds_for_every_correction():
    check_correction("icepop", ratio=0.6)


def test_defaults_and_ranges():
    assert (build_correction("icepop").low, build_correction("icepop").high) == (0.5, 5.0)
    for options in ({"low": 1.1}, {"low": -0.1}, {"high": 0.9}):
        with pytest.raises(ValueError, match="IcePop: option (low|high)=.*must be"):
            build_correction("icepop", **options)
