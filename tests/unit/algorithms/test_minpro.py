"""MinPRO: both forms against a token-by-token oracle, the prefix minimum's definition and what follows from it."""

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rltk.algorithms import build_objective
from rltk.algorithms.minpro import prefix_minimum
from tests.unit.algorithms import properties
from tests.unit.algorithms.tables import gradient, make_batch, random_batch

FORMS = ["product", "cispo"]


def oracle(batch, row, form, low=0.2, high=0.28, dual=None):
    """(loss, d loss / d new) of each token of one row, in plain Python."""
    ratios, losses, slopes = [], [], []
    advantage = batch.advantage[row].item()
    for t in range(batch.new.shape[1]):
        if not batch.mask[row, t]:
            losses.append(0.0)
            slopes.append(0.0)
            continue
        new, old = batch.new[row, t].item(), batch.old[row, t].item()
        product = math.exp(new - old) * (min(ratios) if ratios else 1.0)
        ratios.append(math.exp(new - old))
        inside = min(max(product, 1 - low), 1 + high)
        if form == "cispo":
            weight = min(inside, dual) if dual is not None and advantage < 0 else inside
            loss, slope = -weight * advantage * new, -weight * advantage
        else:
            clipped = -advantage * inside > -advantage * product
            loss, slope = -advantage * (inside if clipped else product), 0.0 if clipped else -advantage * product
            if dual is not None and advantage < 0 and loss > -advantage * dual:
                loss, slope = -advantage * dual, 0.0
        losses.append(loss)
        slopes.append(slope)
    return losses, slopes


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("options", [{}, {"low": 0.05, "high": 0.4}, {"high": 3.0, "dual": 1.1}])
@pytest.mark.parametrize("seed", range(3))
def test_against_a_token_by_token_oracle(seed, options, form):
    batch = random_batch(seed, ratio=0.2)
    names = {"low": "clip_low", "high": "clip_high", "dual": "dual_clip"}
    objective = build_objective(
        "minpro", form=form, aggregation="token-sum", **{names[key]: value for key, value in options.items()}
    )
    rows = [oracle(batch, row, form, **options) for row in range(6)]
    assert objective.loss(batch)[0].item() == pytest.approx(sum(sum(losses) for losses, _ in rows))
    torch.testing.assert_close(gradient(objective, batch), torch.tensor([slopes for _, slopes in rows]).double())


def test_the_prefix_minimum_is_exclusive_and_sees_sampled_tokens_only():
    values = torch.tensor([[0.3, 0.1, 0.0, 0.2, -0.4, 9.0], [0.5, 0.0, 0.7, 0.6, 0.0, 0.0]], dtype=torch.float64)
    mask = torch.tensor([[1, 1, 0, 1, 1, 1], [0, 0, 1, 1, 0, 1]]).bool()
    expected = [[0.0, 0.3, 0.1, 0.1, 0.1, -0.4], [0.0, 0.0, 0.0, 0.7, 0.6, 0.6]]
    assert prefix_minimum(values, mask).tolist() == expected
    assert prefix_minimum(values[:, :1], mask[:, :1]).tolist() == [[0.0], [0.0]]


def ratios(batch, position):
    """The product at one position: with A = 1 there alone, the unclipped loss is minus it."""
    only = torch.zeros_like(batch.old)
    only[:, position] = 1.0
    objective = build_objective("minpro", clip_low=1.0, clip_high=1e9)
    return -objective.token_loss(replace(batch, advantage=only))[0][:, position]


def table(seed, length, upper=2.0):
    g = torch.Generator().manual_seed(seed)
    log_ratio = (torch.rand(5, length, generator=g).double() - 1) * 0.5 * upper + (upper - 1) * 0.5
    old = torch.full((5, length), -2.0).double()
    return make_batch(old + log_ratio, old, torch.randn(5, generator=g).double()), log_ratio


def test_one_token_is_grpo_and_two_are_the_cumulative_ratio():
    batch, log_ratio = table(0, 2)
    first = replace(batch, **{f: getattr(batch, f)[:, :1] for f in ("new", "old", "mu", "mask")})
    minpro, grpo = (build_objective(name, clip_high=0.28, aggregation="token-mean") for name in ("minpro", "grpo"))
    torch.testing.assert_close(minpro.loss(first)[0], grpo.loss(first)[0])
    torch.testing.assert_close(gradient(minpro, first), gradient(grpo, first))
    torch.testing.assert_close(ratios(batch, 1), log_ratio.sum(dim=1).exp())
    assert (ratios(batch, 1) > ratios(batch, 0)).any(), "a prefix ratio above 1 is not cut to 1"


@given(st.integers(0, 10_000))
@settings(max_examples=20, deadline=None)
def test_below_one_it_lies_between_the_cumulative_and_the_tokens_ratio(seed):
    batch, log_ratio = table(seed, 6, upper=1.0)  # every ratio is at most 1
    for t in range(6):
        product = ratios(batch, t)
        assert (product <= log_ratio[:, t].exp() + 1e-12).all()
        assert (product >= log_ratio[:, : t + 1].sum(dim=1).exp() - 1e-12).all()


def test_the_order_of_the_prefix_does_not_count():
    batch, _ = table(3, 6)
    order = torch.tensor([4, 2, 0, 1, 3, 5])
    shuffled = replace(batch, new=batch.new[:, order])
    torch.testing.assert_close(ratios(shuffled, 5), ratios(batch, 5))


@pytest.mark.parametrize("form", FORMS)
def test_no_gradient_reaches_an_earlier_token(form):
    batch, _ = table(4, 6)
    only = torch.zeros(5, 6).double()
    only[:, 4] = 1.0
    objective = build_objective("minpro", form=form, clip_low=1.0, clip_high=50.0)
    slopes = gradient(objective, replace(batch, advantage=only))
    assert slopes.nonzero()[:, 1].unique().tolist() == [4]


def test_the_product_is_bounded_like_any_ratio():
    old = torch.full((1, 2), -20.0).double()
    objective = build_objective("minpro", aggregation="token-sum")
    up = make_batch(old + 15, old, torch.tensor([-1.0]).double())
    assert objective.loss(up)[0].item() == pytest.approx(math.exp(15) + math.exp(20))
    down = make_batch(old - 15, old, torch.ones(1).double())
    assert objective.loss(down)[0].item() == pytest.approx(-math.exp(-15) - math.exp(-20), rel=1e-12)


def test_against_the_sampler_and_what_it_logs():
    batch = random_batch(6)
    sampler = build_objective("minpro", reference="mu")
    old = build_objective("minpro").loss(replace(batch, old=batch.mu))
    torch.testing.assert_close(sampler.loss(batch)[0], old[0])
    log_ratio = torch.where(batch.mask, batch.new - batch.mu, 0.0)
    prefix = prefix_minimum(log_ratio, batch.mask)[batch.mask]
    torch.testing.assert_close(sampler.loss(batch)[1]["log_prefix/mean"], prefix.mean())
    assert old[1]["clip/outside"] > 0


@pytest.mark.parametrize("form", FORMS)
def test_what_holds_for_every_objective(form):
    objective, batch = build_objective("minpro", form=form), properties.filled_batch(8, padding=True)
    properties.check_on_policy(objective, batch, batch.advantage[:, None])
    properties.check_masked_tokens(objective, batch)
    properties.check_order(objective, batch)
    properties.check_equal_rewards(objective, batch)
    properties.check_extremes(objective)
    properties.check_splits(lambda: build_objective("minpro", form=form), batch, [2, 2], [1, 4])


def test_the_configuration_and_its_values():
    properties.check_configuration("minpro")
    objective = build_objective("minpro")
    assert (objective.clip_low, objective.clip_high, objective.dual_clip) == (0.2, 0.28, None)
    assert objective.aggregation == "token-mean" and objective.form == "product" and objective.needs == frozenset()
    with pytest.raises(ValueError, match="form='minimum' .*one of product, cispo"):
        build_objective("minpro", form="minimum")
