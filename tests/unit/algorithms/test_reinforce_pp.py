"""REINFORCE++: rewards whitened over the tokens of the optimizer batch, on every rank the same."""

from dataclasses import replace

import pytest
import torch

from rltk.algorithms import Correction, build_objective
from tests.unit.algorithms import properties
from tests.unit.algorithms.tables import gradient, random_batch


def whitened(batch, ddof=1, eps=1e-6, std=True):
    """By definition: every masked token carries its sequence's reward."""
    tokens = torch.cat([batch.advantage[row].expand(int(batch.mask[row].sum())) for row in range(len(batch.mask))])
    return (batch.advantage - tokens.mean()) / (tokens.std(correction=ddof) + eps if std else 1.0)


@pytest.mark.parametrize("options", [{}, {"ddof": 0}, {"std": False}, {"eps": 0.5}, {"ddof": 0, "eps": 0.0}])
@pytest.mark.parametrize("first", [True, False])
def test_whitening_is_over_tokens(options, first):
    batch = properties.filled_batch(0, padding=True)
    prepared = build_objective("reinforce_pp", **options).prepare(batch, first=first)
    torch.testing.assert_close(prepared.advantage, whitened(batch, **options), rtol=1e-12, atol=1e-12)
    by_sequence = (batch.advantage - batch.advantage.mean()) / batch.advantage.std()
    assert (prepared.advantage - by_sequence).abs().max() > 1e-2  # the lengths count


def test_the_tokens_have_mean_zero_and_deviation_one():
    batch = random_batch(1)
    prepared = build_objective("reinforce_pp", eps=0.0).prepare(batch)
    tokens = prepared.advantage[:, None].expand(-1, 7)[batch.mask]
    assert tokens.mean().item() == pytest.approx(0.0, abs=1e-12)
    assert tokens.std().item() == pytest.approx(1.0)


def test_a_shift_and_a_scale_of_the_rewards_change_nothing():
    batch = random_batch(2)
    objective = build_objective("reinforce_pp", eps=0.0)
    changed = objective.prepare(replace(batch, advantage=3 * batch.advantage + 7)).advantage
    torch.testing.assert_close(changed, objective.prepare(batch).advantage)


def test_ranks_whiten_together_and_one_may_hold_nothing():
    batch = properties.filled_batch(3, rows=8)
    shards = [batch.select(slice(a, b)) for a, b in ((0, 5), (5, 5), (5, 8))]
    objectives = [build_objective("reinforce_pp") for _ in shards]
    parts = properties.prepare_on_ranks(objectives, shards)
    expected = build_objective("reinforce_pp").prepare(batch).advantage
    torch.testing.assert_close(torch.cat([part.advantage for part in parts]), expected, rtol=0, atol=1e-12)


def test_advantages_are_the_rewards_of_valid_samples():
    objective = build_objective("reinforce_pp")
    rewards, group = torch.tensor([1.0, float("nan"), 3.0]), torch.tensor([0, 0, 1])
    valid = torch.tensor([True, False, True])
    assert objective.advantages(rewards, group, valid).tolist() == [1.0, 0.0, 3.0]
    with_two = build_objective("reinforce_pp", min_group=2)
    assert with_two.advantages(rewards, group, valid).tolist() == [0.0, 0.0, 0.0]


def test_an_advantage_for_each_token_is_whitened_too():
    batch = random_batch(4)
    table = batch.advantage[:, None].expand(-1, 7).masked_fill(~batch.mask, torch.nan)
    prepared = build_objective("reinforce_pp").prepare(replace(batch, advantage=table))
    expected = build_objective("reinforce_pp").prepare(batch).advantage[:, None].expand(-1, 7)
    torch.testing.assert_close(prepared.advantage[batch.mask], expected[batch.mask])


@pytest.mark.parametrize("reward", [0.1, -7.7, 0.0])
def test_equal_rewards_give_exactly_zero_and_close_ones_do_not(reward):
    batch = random_batch(5)
    objective = build_objective("reinforce_pp", eps=0.0)
    equal = replace(batch, advantage=torch.full((6,), reward).double())
    assert objective.prepare(equal).advantage.tolist() == [0.0] * 6
    assert build_objective("reinforce_pp", std=False).prepare(equal).advantage.tolist() == [0.0] * 6
    close = replace(batch, advantage=reward + 1e-6 * torch.arange(6).double())
    torch.testing.assert_close(objective.prepare(close).advantage, whitened(close, eps=0.0), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("tokens", [0, 1])
def test_one_token_is_its_own_mean_and_none_does_no_harm(tokens):
    batch = random_batch(6, rows=1, length=3)
    batch = replace(batch, mask=torch.arange(3)[None] < tokens)
    assert build_objective("reinforce_pp").prepare(batch).advantage.tolist() == [0.0]


@pytest.mark.parametrize(("ddof", "deviation"), [(0, 1.0), (1, 2**0.5)])
def test_two_tokens_are_enough_for_a_deviation(ddof, deviation):
    batch = random_batch(6, rows=2, length=3)
    batch = replace(batch, mask=torch.tensor([[1, 0, 0], [0, 0, 1]]), advantage=torch.tensor([1.0, 3.0]).double())
    found = build_objective("reinforce_pp", ddof=ddof, eps=0.0).prepare(batch).advantage
    assert found.tolist() == pytest.approx([-1 / deviation, 1 / deviation])


def test_in_float32_the_dtype_stays():
    batch = random_batch(7)
    tokens = {name: getattr(batch, name).float() for name in ("new", "old", "mu", "ref", "advantage")}
    prepared = build_objective("reinforce_pp").prepare(replace(batch, **tokens))
    assert prepared.advantage.dtype == torch.float32
    torch.testing.assert_close(prepared.advantage.double(), whitened(batch), rtol=1e-5, atol=1e-5)


def test_the_correction_is_prepared_as_well():
    calls = []

    class Counting(Correction):
        def __call__(self, batch):
            return torch.ones_like(batch.old), batch.mask

        def prepare(self, shard, reduce):
            calls.append(reduce(torch.ones(1)).item())

    build_objective("reinforce_pp", correction=Counting()).prepare(random_batch(0), lambda value: 4 * value)
    assert calls == [4.0]


def test_the_loss_is_ppos():
    batch = random_batch(8, ratio=0.3)
    grpo = build_objective("grpo", aggregation="token-mean")
    torch.testing.assert_close(gradient(build_objective("reinforce_pp"), batch), gradient(grpo, batch))


def test_what_holds_for_every_objective():
    objective, batch = build_objective("reinforce_pp"), properties.filled_batch(8, padding=True)
    properties.check_on_policy(objective, batch, whitened(batch)[:, None])
    properties.check_masked_tokens(objective, batch)
    properties.check_order(objective, batch)
    properties.check_equal_rewards(objective, batch)
    properties.check_extremes(objective)
    properties.check_splits(lambda: build_objective("reinforce_pp"), batch, [2, 2], [1, 4])


def test_the_configuration_and_its_values():
    properties.check_configuration("reinforce_pp")
    objective = build_objective("reinforce_pp")
    assert (objective.clip_low, objective.clip_high, objective.dual_clip, objective.beta) == (0.2, 0.2, None, 0.0)
    assert objective.aggregation == "token-mean" and objective.std is True and objective.min_group == 1
