"""The smallest weight before the token, times its own: exclusive minimum, transparent tool tokens, optional cap."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rltk.algorithms import build_correction, build_objective
from tests.unit.algorithms.correction_properties import check_correction
from tests.unit.algorithms.tables import make_batch, random_batch


@pytest.mark.parametrize("seed", range(3))
def test_against_a_token_by_token_oracle(seed):
    batch = random_batch(seed, ratio=0.4)
    weight, kept = build_correction("prefix_min")(batch)
    ratio = (batch.old - batch.mu).exp()
    for row in range(6):
        before = []
        for t in range(7):
            if batch.mask[row, t]:
                own = ratio[row, t].item()
                assert weight[row, t].item() == pytest.approx(own * min(before, default=1.0)) and kept[row, t]
                before.append(own)


def test_two_tokens_are_the_cumulative_weight():
    """And the minimum is not bounded by 1: a prefix that the sampler took too seldom counts for more."""
    old, mu = torch.zeros(1, 2).double(), torch.tensor([[-0.4, 0.1]]).double()
    batch = make_batch(old, old, torch.ones(1).double(), mu=mu)
    weight, _ = build_correction("prefix_min")(batch)
    torch.testing.assert_close(weight, build_correction("prefix_cum", cap=9.0)(batch)[0])
    torch.testing.assert_close(weight[0, 1].log().item(), 0.3)


@given(seed=st.integers(0, 1000))
@settings(max_examples=20, deadline=None)
def test_where_all_weights_are_at_most_one_it_lies_between_product_and_own(seed):
    g = torch.Generator().manual_seed(seed)
    old = -torch.rand(3, 6, generator=g).double()
    batch = make_batch(old, old, torch.ones(3).double(), mu=torch.zeros(3, 6).double())
    weight, _ = build_correction("prefix_min")(batch)
    assert (old.cumsum(1).exp() <= weight + 1e-12).all() and (weight <= old.exp() + 1e-12).all()


def test_the_cap_and_what_is_reported():
    old, mu = torch.zeros(1, 4).double(), torch.tensor([[-0.5, -0.5, -0.5, 0.5]]).double()  # e^.5, e^1, e^1, e^0
    batch = make_batch(old, old, torch.ones(1).double(), mu=mu)
    capped = build_objective("grpo", correction=build_correction("prefix_min", cap=2.0)).loss(batch)[1]
    assert capped["correction/tokens"].item() == 0.5 and capped["correction/weight_max"].item() == 2.0
    plain = build_objective("grpo", correction=build_correction("prefix_min")).loss(batch)[1]
    assert plain["correction/tokens"] == 0 and plain["correction/weight_max"].item() == pytest.approx(2.71828, rel=1e-5)


@pytest.mark.parametrize("drift", [15.0, -15.0])
def test_two_extreme_tokens_are_bounded_as_one_is(drift):
    old = torch.full((1, 2), -20.0)
    weight, _ = build_correction("prefix_min")(make_batch(old, old, torch.ones(1), mu=old - drift))
    assert weight.log()[0].tolist() == pytest.approx([drift, 20.0 if drift > 0 else -20.0], rel=1e-5)


@pytest.mark.parametrize("options", [{}, {"cap": 1.2}])
def test_what_holds_for_every_correction(options):
    check_correction("prefix_min", ratio=0.4, **options)


def test_a_weight_at_the_cap_is_not_truncated():
    old = torch.zeros(1, 2).double()
    batch = make_batch(old, old, torch.ones(1).double())
    objective = build_objective("grpo", correction=build_correction("prefix_min", cap=1.0))
    assert objective.loss(batch)[1]["correction/tokens"] == 0


def test_defaults_and_ranges():
    assert build_correction("prefix_min").cap is None
    with pytest.raises(ValueError, match="cap=0.5 .*a number >= 1 or null"):
        build_correction("prefix_min", cap=0.5)
