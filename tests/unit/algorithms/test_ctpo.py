"""CTPO: the loss against a token-by-token oracle, masks, the window, where gradient flows, reference=mu."""

import math
from dataclasses import replace

import pytest
import torch

from rltk.algorithms import build_objective
from tests.unit.algorithms import properties
from tests.unit.algorithms.tables import gradient, make_batch, random_batch


def oracle(batch, row, low=0.025, high=0.05, dual: float | None = 0.05, power=0.5, scale=1.0, mu=False):
    """(loss, d loss / d new) of each token of one row, in plain Python."""
    total, position, losses, slopes = 0.0, 0, [], []
    reference = batch.mu if mu else batch.old
    for t in range(batch.new.shape[1]):
        if not batch.mask[row, t]:
            losses.append(0.0)
            slopes.append(0.0)
            continue
        position += 1
        total += max(-20.0, min(20.0, (batch.new - reference)[row, t].item()))
        width, advantage = scale * position**power, batch.advantage[row].item()
        clipped = max(-low * width, min(high * width, total))
        if -advantage * math.exp(total) >= -advantage * math.exp(clipped):
            loss, slope = -advantage * math.exp(total), -advantage * math.exp(total)
        else:
            loss, slope = -advantage * math.exp(clipped), 0.0
        if dual is not None and advantage < 0 and loss > -advantage * math.exp(dual * width):
            loss, slope = -advantage * math.exp(dual * width), 0.0
        losses.append(loss)
        slopes.append(slope)
    return losses, slopes


@pytest.mark.parametrize("options", [{}, {"dual": None}, {"power": 0.0}, {"power": 1.0}, {"low": 0.1, "high": 0.01}])
@pytest.mark.parametrize("seed", range(3))
def test_against_a_token_by_token_oracle(seed, options):
    batch = random_batch(seed)
    names = {"dual": "dual_clip", "power": "position_power", "low": "clip_low", "high": "clip_high"}
    objective = build_objective(
        "ctpo", aggregation="token-sum", **{names[key]: value for key, value in options.items()}
    )
    rows = [oracle(batch, row, **options) for row in range(6)]
    assert objective.loss(batch)[0].item() == pytest.approx(sum(sum(losses) for losses, _ in rows))
    torch.testing.assert_close(gradient(objective, batch), torch.tensor([slopes for _, slopes in rows]).double())


@pytest.mark.parametrize("advantage", [1.0, -1.0])
@pytest.mark.parametrize("log_ratio", [-0.3, -0.02, 0.0, 0.03, 0.3])
def test_one_token_is_ppo_clipped_in_log_space(advantage, log_ratio):
    old = torch.full((1, 1), -1.0).double()
    batch = make_batch(old + log_ratio, old, torch.tensor([advantage]).double())
    ctpo = build_objective("ctpo", dual_clip=None)
    ppo = build_objective("grpo", clip_low=1 - math.exp(-0.025), clip_high=math.exp(0.05) - 1)
    torch.testing.assert_close(ctpo.loss(batch)[0], ppo.loss(batch)[0])
    torch.testing.assert_close(gradient(ctpo, batch), gradient(ppo, batch))


def test_inserting_masked_tokens_changes_nothing():
    batch = random_batch(7, rows=3, length=6, ratio=0.03)
    full = replace(batch, mask=torch.ones(3, 6), **{f: torch.randn(3, 6).double() * 0.05 for f in ("new", "old")})
    places = torch.tensor([1, 2, 5, 6, 7, 10])  # tool tokens before, inside and after

    def spread(value, fill):
        wide = torch.full((3, 11), fill).to(value.dtype)
        wide[:, places] = value
        return wide

    wide = make_batch(
        new=spread(full.new, 9.0),
        old=spread(full.old, -torch.inf),
        mu=spread(full.old, torch.nan),
        mask=spread(full.mask, False),
        advantage=full.advantage,
    )
    for how in ("token-mean", "seq-mean-token-mean", "seq-mean-token-sum-norm"):
        objective = build_objective("ctpo", aggregation=how)
        torch.testing.assert_close(objective.loss(wide)[0], objective.loss(full)[0])
        torch.testing.assert_close(gradient(objective, wide)[:, places], gradient(objective, full))


def test_no_gradient_reaches_an_earlier_token():
    old = torch.full((1, 7), -1.01).double()
    batch = make_batch(old + 0.01, old, torch.zeros(1).double())
    objective = build_objective("ctpo", aggregation="token-sum")
    for t in range(7):
        only = torch.zeros(1, 7).double()
        only[0, t] = 1.0
        slopes = gradient(objective, replace(batch, advantage=only))
        assert slopes[0].nonzero().flatten().tolist() == [t]
        assert slopes[0, t].item() == pytest.approx(-math.exp(0.01 * (t + 1)))  # the value is the whole prefix's


@pytest.mark.parametrize(("power", "first_clipped"), [(0.0, 6), (0.5, 26), (1.0, None)])
def test_the_window_grows_as_the_power_says(power, first_clipped):
    """A steady drift of .01 a token leaves .05 p^a after token 5 (fixed), 25 (sqrt), never (linear)."""
    old = torch.full((1, 40), -1.0).double()
    batch = make_batch(old + 0.01 * (1 - 1e-9), old, torch.ones(1).double())
    slopes = gradient(build_objective("ctpo", position_power=power), batch)[0]
    clipped = (slopes == 0).nonzero().flatten().tolist()
    assert clipped == ([] if first_clipped is None else list(range(first_clipped - 1, 40)))


def test_metrics_hold_the_moments_of_log_rho():
    batch = replace(random_batch(9), mask=torch.ones(6, 7), new=torch.randn(6, 7).double() / 9)
    batch = replace(batch, old=torch.zeros(6, 7).double(), mu=torch.zeros(6, 7).double())
    metrics = build_objective("ctpo").loss(batch)[1]
    log_rho = batch.new.cumsum(1)
    torch.testing.assert_close(metrics["log_rho/mean"], log_rho.mean())
    torch.testing.assert_close(metrics["log_rho/square"], (log_rho**2).mean())
    assert metrics["clip/share"] > 0


def test_what_holds_for_every_objective():
    objective, batch = build_objective("ctpo"), properties.filled_batch(8, padding=True)
    properties.check_on_policy(objective, batch, batch.advantage[:, None])
    properties.check_masked_tokens(objective, batch)
    properties.check_order(objective, batch)
    properties.check_equal_rewards(objective, batch)
    properties.check_extremes(objective)
    properties.check_splits(lambda: build_objective("ctpo"), batch, [2, 2], [1, 4])


@pytest.mark.parametrize("length", [4096, 32768])
def test_long_sequences_in_float32(length):
    g = torch.Generator().manual_seed(0)
    old = torch.full((2, length), -1.5).double()
    new = old + 0.017 * torch.randn(2, length, generator=g).double()
    exact = make_batch(new, old, torch.tensor([1.0, -1.0]).double())
    single = make_batch(new.float(), old.float(), torch.tensor([1.0, -1.0]))
    objective = build_objective("ctpo")
    loss, metrics = objective.loss(single)
    reference, reference_metrics = objective.loss(exact)
    torch.testing.assert_close(loss.double(), reference, rtol=1e-4, atol=1e-4)
    assert metrics["clip/outside"].item() == pytest.approx(reference_metrics["clip/outside"].item(), abs=1e-3)
    assert 0.0 < metrics["clip/outside"] < 0.5  # the window keeps up with the spread: that is the method


@pytest.mark.parametrize("options", [{}, {"dual_clip": None}, {"clip_high": 5.0, "dual_clip": 5.0}])
@pytest.mark.parametrize("drift", [-15.0, 15.0])
def test_runaway_ratios_stay_finite_in_float32(options, drift):
    old = torch.full((3, 3000), -20.0)
    batch = make_batch(old + drift, old, torch.tensor([1.0, -1.0, 0.0]))
    objective = build_objective("ctpo", **options)
    loss, metrics = objective.loss(batch)
    assert loss.isfinite() and all(value.isfinite() for value in metrics.values())
    assert gradient(objective, batch).isfinite().all()


def test_log_rho_is_bounded_above_the_window_and_then_has_no_gradient():
    old = torch.full((1, 4), -20.0).double()
    batch = make_batch(old + 4.0, old, torch.tensor([-1.0]).double())
    objective = build_objective("ctpo", dual_clip=None, aggregation="token-sum")
    slopes = gradient(objective, batch)[0]
    assert slopes.tolist() == pytest.approx([math.exp(4), math.exp(8), 0.0, 0.0])
    on_it = make_batch(old[:, :1] + 10.0, old[:, :1], torch.tensor([-1.0]).double())
    assert gradient(objective, on_it).item() == pytest.approx(math.exp(10))
    assert objective.loss(batch)[0].item() == pytest.approx(math.exp(4) + math.exp(8) + 2 * math.exp(10))
    wide = build_objective("ctpo", dual_clip=None, clip_high=8.0, aggregation="token-sum")  # ceiling 8 sqrt(p) + 1 >= 9
    assert (gradient(wide, batch)[0, :3] > 0).all()


@pytest.mark.parametrize("clip_high", [8.0, 12.0])
def test_the_ceiling_lies_one_above_the_window(clip_high):
    old = torch.full((1, 3), -100.0).double()
    batch = make_batch(old + 20.0, old, torch.tensor([-1.0]).double())
    wide = build_objective("ctpo", dual_clip=None, clip_high=clip_high, aggregation="token-sum")
    ceilings = [max(10.0, clip_high * position**0.5 + 1) for position in (1, 2, 3)]
    assert wide.loss(batch)[0].item() == pytest.approx(sum(map(math.exp, ceilings)))
    assert not gradient(wide, batch).any()


def test_against_the_sampler_the_window_is_scaled_by_the_mismatch():
    batch = random_batch(10, ratio=0.1)
    objective = build_objective("ctpo", reference="mu", aggregation="token-sum")
    with pytest.raises(ValueError, match="prepare"):
        objective.loss(batch)
    objective.prepare(batch)
    gap = (batch.old - batch.mu)[batch.mask]
    scale = gap.std(correction=0).item() / 0.017
    loss, metrics = objective.loss(batch)
    assert scale > 3 and metrics["window/scale"].item() == pytest.approx(scale)
    expected = sum(sum(oracle(batch, row, scale=scale, mu=True)[0]) for row in range(6))
    assert loss.item() == pytest.approx(expected)


def test_the_scale_is_never_under_one_and_is_held_for_the_step():
    close, far = random_batch(11, ratio=0.001), random_batch(11, ratio=0.2)
    objective = build_objective("ctpo", reference="mu")
    objective.prepare(close)
    assert objective.loss(close)[1]["window/scale"].item() == pytest.approx(1.0)
    objective.prepare(far, first=False)
    assert objective.loss(far)[1]["window/scale"].item() == pytest.approx(1.0)
    objective.prepare(far, first=True)
    assert objective.loss(far)[1]["window/scale"].item() > 5


def test_ranks_agree_on_the_scale():
    batch = random_batch(12)
    shards = [batch.select(slice(0, 2)), batch.select(slice(2, 6))]
    alone = build_objective("ctpo", reference="mu")
    alone.prepare(batch)
    sums = []
    for shard in shards:
        build_objective("ctpo", reference="mu").prepare(shard, lambda value: sums.append(value) or value)
    for shard in shards:
        rank = build_objective("ctpo", reference="mu")
        rank.prepare(shard, lambda value: sums[0] + sums[1])
        expected = alone.loss(shard)[1]["window/scale"]
        torch.testing.assert_close(rank.loss(shard)[1]["window/scale"], expected)


def test_a_mismatch_that_cannot_be_measured_is_refused():
    batch = random_batch(13)
    objective = build_objective("ctpo", reference="mu")
    for wrong in (replace(batch, mask=torch.zeros(6, 7)), replace(batch, mu=torch.full((6, 7), torch.nan).double())):
        with pytest.raises(ValueError, match="sd.old - mu."):
            objective.prepare(wrong)
