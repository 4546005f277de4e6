"""RLOO: the leave-one-out baseline by its definition, and that it is unbiased, by listing every group."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rltk.algorithms import build_objective
from tests.unit.algorithms import properties
from tests.unit.algorithms.tables import gradient, make_batch, random_batch


def of(rewards, group=None, valid=None, **options):
    rewards = torch.tensor(rewards, dtype=torch.float64)
    group = torch.zeros(len(rewards), dtype=torch.long) if group is None else torch.tensor(group)
    valid = torch.ones(len(rewards), dtype=torch.bool) if valid is None else torch.tensor(valid)
    return build_objective("rloo", **options).advantages(rewards, group, valid)


@given(st.lists(st.integers(-20, 20), min_size=7, max_size=7))
@settings(max_examples=40, deadline=None)
def test_each_is_measured_against_the_mean_of_the_others(rewards):
    group, valid = [3, 8, 3, 3, 8, 8, 8], [True, True, True, True, True, False, True]
    advantage = of(rewards, group, valid)
    for i in range(7):
        others = [rewards[j] for j in range(7) if j != i and group[j] == group[i] and valid[j]]
        expected = rewards[i] - sum(others) / len(others) if valid[i] else 0.0
        assert advantage[i].item() == pytest.approx(expected)
    assert abs(advantage[[0, 2, 3]].sum().item()) < 1e-9


def test_invalid_samples_and_groups_that_are_dropped_get_zero():
    advantage = of([1.0, 5.0, float("nan"), 3.0, 0.0], [0, 1, 1, 2, 2], [True, True, False, True, True])
    assert advantage.tolist() == [0.0, 0.0, 0.0, 3.0, -3.0]
    assert of([1.0, 0.0, 2.0], min_group=4).tolist() == [0.0, 0.0, 0.0]
    assert of([0.1] * 3, std=True, eps=0.0).tolist() == [0.0] * 3
    assert of([2.0, 0.0]).dtype == torch.float64
    single = build_objective("rloo").advantages(torch.tensor([1.0, 0.0]), torch.zeros(2).long(), torch.ones(2).bool())
    assert single.dtype == torch.float32 and single.tolist() == [1.0, -1.0]


def test_std_divides_further():
    rewards = [1.0, 0.0, 0.0, 4.0]
    torch.testing.assert_close(of(rewards, std=True, eps=0.0), of(rewards) / torch.tensor(rewards).double().std())


def test_its_gradient_is_unbiased_and_that_of_the_plain_mean_too_small():
    """Every group of 3 samples of a one-token policy, weighted by its probability: the mean is grad E[R]."""
    logits = torch.tensor([0.3, -0.8, 0.9], dtype=torch.float64, requires_grad=True)
    logprobs, reward = logits.log_softmax(dim=0), torch.tensor([1.0, 0.0, -0.5]).double()
    expected = torch.autograd.grad((logprobs.exp() * reward).sum(), logits, retain_graph=True)[0]

    def of_groups(name):
        objective, total = build_objective(name, std=False, aggregation="token-mean"), torch.zeros(3).double()
        for group in itertools.product(range(3), repeat=3):
            rows = torch.tensor(group)
            new = logprobs[rows][:, None]
            advantage = objective.advantages(reward[rows], torch.zeros(3).long(), torch.ones(3).bool())
            loss = objective.loss(make_batch(new, new.detach(), advantage))[0]
            total -= new.detach().sum().exp() * torch.autograd.grad(loss, logits, retain_graph=True)[0]
        return total

    torch.testing.assert_close(of_groups("rloo"), expected)
    torch.testing.assert_close(of_groups("grpo"), expected * 2 / 3)


def test_the_loss_is_ppos():
    batch = random_batch(0, ratio=0.3)
    grpo = build_objective("grpo", aggregation="token-mean")
    torch.testing.assert_close(gradient(build_objective("rloo"), batch), gradient(grpo, batch))


def test_what_holds_for_every_objective():
    objective, batch = build_objective("rloo"), properties.filled_batch(8, padding=True)
    properties.check_on_policy(objective, batch, batch.advantage[:, None])
    properties.check_masked_tokens(objective, batch)
    properties.check_order(objective, batch)
    properties.check_equal_rewards(objective, batch)
    properties.check_extremes(objective)
    properties.check_splits(lambda: build_objective("rloo"), batch, [2, 2], [1, 4])


def test_the_configuration_and_its_values():
    properties.check_configuration("rloo")
    objective = build_objective("rloo")
    assert (objective.clip_low, objective.clip_high, objective.dual_clip, objective.beta) == (0.2, 0.2, None, 0.0)
    assert objective.std is False and objective.aggregation == "token-mean" and objective.min_group == 2
