"""DHPO: the mixture of the two clipped losses, its ends, and the weights from entropy."""

import math
from dataclasses import replace

import pytest
import torch

from rltk.algorithms import build_objective
from tests.unit.algorithms import properties
from tests.unit.algorithms.tables import gradient, make_batch, random_batch

CLIPS = {"clip_low": 0.1, "clip_high": 0.15, "sequence_clip_low": 0.02, "sequence_clip_high": 0.03}


def clipped(ratio, advantage, low, high, dual):
    """(loss, share of the gradient -A ratio that is left) of one ratio."""
    inside = min(max(ratio, low), high)
    loss, left = max(-advantage * ratio, -advantage * inside), float(-advantage * inside <= -advantage * ratio)
    if dual is not None and advantage < 0 and loss > -advantage * dual:
        return -advantage * dual, 0.0
    return loss, left


def oracle(batch, weight, dual=None):
    """(sum of losses, d / d new) with `weight` `[B, T]` on the token ratio and CLIPS, in plain Python."""
    slopes, total = torch.zeros_like(batch.old), 0.0
    for row in range(len(batch.old)):
        log_ratio = (batch.new - batch.old)[row]
        count = int(batch.mask[row].sum())
        s, advantage = math.exp(log_ratio[batch.mask[row]].sum().item() / max(count, 1)), batch.advantage[row].item()
        of_s, left_s = clipped(s, advantage, 0.98, 1.03, dual)
        for t in batch.mask[row].nonzero().flatten().tolist():
            ratio, w = math.exp(log_ratio[t].item()), weight[row, t].item()
            of_r, left_r = clipped(ratio, advantage, 0.9, 1.15, dual)
            total += w * of_r + (1 - w) * of_s
            slopes[row, t] = -advantage * (w * ratio * left_r + (1 - w) * s * left_s)
    return total, slopes


def check(objective, batch, weight, dual=None):
    total, slopes = oracle(batch, weight, dual)
    loss, metrics = objective.loss(batch)
    assert loss.item() == pytest.approx(total)
    torch.testing.assert_close(gradient(objective, batch), slopes)
    assert metrics["weight/token"].item() == pytest.approx(weight[batch.mask].mean().item())


@pytest.mark.parametrize("dual", [None, 1.1, 1.005])
@pytest.mark.parametrize("token_weight", [0.5, 0.0, 0.3, 1.0])
def test_a_constant_mixture(token_weight, dual):
    batch = random_batch(0)
    objective = build_objective("dhpo", token_weight=token_weight, dual_clip=dual, aggregation="token-sum", **CLIPS)
    check(objective, batch, torch.full((6, 7), token_weight).double(), dual)


def test_entropy_is_the_tokens_share():
    batch = properties.filled_batch(1, padding=True)
    check(build_objective("dhpo", mixing="entropy", aggregation="token-sum", **CLIPS), batch, batch.entropy)


def test_entropy_rescaled_within_each_sequence():
    batch = properties.filled_batch(2, padding=True)
    weight = torch.zeros_like(batch.entropy)
    for row in range(6):
        seen = batch.entropy[row, batch.mask[row]]
        if len(seen):
            spread = seen.max() - seen.min()
            weight[row, batch.mask[row]] = (seen - seen.min()) / spread if spread > 0 else torch.full_like(seen, 0.5)
    objective = build_objective("dhpo", mixing="entropy-minmax", aggregation="token-sum", **CLIPS)
    check(objective, batch, weight)
    flat = replace(batch, entropy=torch.full((6, 7), 0.2).double())
    check(objective, flat, torch.full((6, 7), 0.5).double())


@pytest.mark.parametrize("mixing", ["entropy", "entropy-minmax"])
def test_the_weight_is_detached(mixing):
    batch = properties.filled_batch(3)
    entropy = torch.where(batch.mask, batch.entropy, 0.5).requires_grad_()
    new = torch.where(batch.mask, batch.new, 0.0).requires_grad_()
    loss, _ = build_objective("dhpo", mixing=mixing).loss(replace(batch, new=new, entropy=entropy))
    loss.backward()
    assert entropy.grad is None and new.grad.count_nonzero() > 0


@pytest.mark.parametrize("dual", [None, 1.2])
def test_its_ends_are_grpo_and_gspo(dual):
    batch = random_batch(4)
    clip = {"clip_low": 0.05, "clip_high": 0.1, "dual_clip": dual}
    all_token = build_objective("dhpo", token_weight=1.0, **clip)
    torch.testing.assert_close(gradient(all_token, batch), gradient(build_objective("grpo", **clip), batch))
    sequence = {"sequence_clip_low": 0.05, "sequence_clip_high": 0.1, "dual_clip": dual}
    all_sequence = build_objective("dhpo", token_weight=0.0, **sequence)
    gspo = build_objective("gspo", form="token", **clip)
    torch.testing.assert_close(gradient(all_sequence, batch), gradient(gspo, batch))
    torch.testing.assert_close(all_sequence.loss(batch)[0], gspo.loss(batch)[0])


def test_an_advantage_for_each_token_is_its_own():
    """Alike, they are the sequence's; otherwise each moves its own token and is clipped by its own sign."""
    batch = random_batch(7)
    spread = torch.where(batch.mask, batch.advantage[:, None].expand(6, 7), torch.nan)
    objective = build_objective("dhpo", **CLIPS)
    torch.testing.assert_close(gradient(objective, replace(batch, advantage=spread)), gradient(objective, batch))
    signs = torch.where(torch.arange(7) % 2 == 0, 1.0, -1.0).double().expand(6, 7)
    mixed = gradient(objective, replace(batch, advantage=signs))
    for sign, columns in ((1.0, slice(0, 7, 2)), (-1.0, slice(1, 7, 2))):
        alone = gradient(objective, replace(batch, advantage=torch.full((6,), sign).double()))
        torch.testing.assert_close(mixed[:, columns], alone[:, columns])


def test_one_token_is_its_own_sequence():
    old = torch.full((1, 1), -1.0).double()
    batch = make_batch(old + 0.01, old, torch.ones(1).double())
    wide = {"sequence_clip_low": 0.5, "sequence_clip_high": 0.5}
    assert gradient(build_objective("dhpo", **wide), batch).item() == pytest.approx(-math.exp(0.01))


def test_a_row_of_padding_may_hold_anything():
    batch = properties.filled_batch(8, padding=True)
    advantage = batch.advantage.clone()
    advantage[properties.NO_TOKEN] = torch.nan
    loss, slopes, metrics = properties.step(build_objective("dhpo"), replace(batch, advantage=advantage))
    expected, expected_slopes, _ = properties.step(build_objective("dhpo"), batch)
    assert torch.equal(loss, expected) and torch.equal(slopes, expected_slopes)
    assert all(value.isfinite() for value in metrics.values())


def test_an_outlier_of_one_ratio_takes_only_its_own_share():
    old = torch.full((1, 4), -3.0).double()
    log_ratio = torch.tensor([[2.0, -0.6, -0.7, -0.7]]).double()  # the first far out, their mean 0
    batch = make_batch(old + log_ratio, old, torch.ones(1).double())
    slopes = gradient(build_objective("dhpo", aggregation="token-sum"), batch)
    assert slopes[0, 0].item() == pytest.approx(-0.5)  # s = 1 alone is left
    assert slopes[0, 1].item() == pytest.approx(-0.5 * math.exp(-0.6) - 0.5)


def test_it_reports_both_clips():
    old = torch.full((2, 2), -3.0).double()
    log_ratio = torch.tensor([[0.5, -0.5], [0.2, 0.2]]).double()
    metrics = build_objective("dhpo").loss(make_batch(old + log_ratio, old, torch.ones(2).double()))[1]
    assert metrics["clip/share"].item() == pytest.approx(1 / 4)  # e^.5 > 1.28
    assert metrics["clip/sequence_share"].item() == pytest.approx(2 / 4)  # the second sequence


def test_against_the_sampler():
    batch = random_batch(5)
    expected = build_objective("dhpo").loss(replace(batch, old=batch.mu))[0]
    torch.testing.assert_close(build_objective("dhpo", reference="mu").loss(batch)[0], expected)


@pytest.mark.parametrize("mixing", ["constant", "entropy", "entropy-minmax"])
def test_what_holds_for_every_objective(mixing):
    wide = {"sequence_clip_low": 0.5, "sequence_clip_high": 0.5, "mixing": mixing}
    objective, batch = build_objective("dhpo", **wide), properties.filled_batch(6, padding=True)
    properties.check_on_policy(objective, batch, batch.advantage[:, None])
    properties.check_masked_tokens(objective, batch)
    properties.check_order(objective, batch)
    properties.check_equal_rewards(objective, batch)
    properties.check_extremes(objective)
    properties.check_splits(lambda: build_objective("dhpo", **wide), batch, [2, 2], [1, 4])


def test_the_configuration_and_its_values():
    properties.check_configuration("dhpo")
    objective = build_objective("dhpo")
    assert (objective.clip_low, objective.clip_high, objective.token_weight) == (0.2, 0.28, 0.5)
    assert (objective.sequence_clip_low, objective.sequence_clip_high, objective.mixing) == (3e-4, 4e-4, "constant")
    assert objective.needs == frozenset() and objective.dual_clip is None
    assert build_objective("dhpo", mixing="entropy", beta=0.1).needs == {"entropy", "ref"}
    with pytest.raises(ValueError, match="needs entropy"):
        build_objective("dhpo", mixing="entropy").loss(random_batch(0))
