"""Group advantages: their algebra, and what is left out of them."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rltk.algorithms import build_objective, valid_groups

REWARDS = st.lists(st.integers(-20, 20).map(lambda n: n / 8), min_size=8, max_size=8)


def of(rewards, group=None, valid=None, **options):
    rewards = torch.tensor(rewards, dtype=torch.float64)
    group = torch.zeros(len(rewards), dtype=torch.long) if group is None else torch.tensor(group)
    valid = torch.ones(len(rewards), dtype=torch.bool) if valid is None else torch.tensor(valid)
    return build_objective("grpo", **options).advantages(rewards, group, valid)


@given(REWARDS, st.booleans())
@settings(max_examples=50, deadline=None)
def test_each_group_sums_to_zero(rewards, std):
    advantage = of(rewards, [0, 1, 0, 1, 0, 1, 0, 0], std=std)
    assert abs(advantage[[0, 2, 4, 6, 7]].sum()) < 1e-9 and abs(advantage[[1, 3, 5]].sum()) < 1e-9


@given(REWARDS, st.floats(0.5, 8), st.floats(-5, 5))
@settings(max_examples=50, deadline=None)
def test_affine_changes_of_the_reward_change_nothing_with_std_on(rewards, scale, shift):
    changed = [scale * reward + shift for reward in rewards]
    torch.testing.assert_close(of(changed), of(rewards), rtol=0, atol=1e-4)  # eps = 1e-6 over a std of at least .03


@pytest.mark.parametrize(("ddof", "size"), [(1, 8), (0, 8), (1, 16)])
def test_binary_rewards_have_the_closed_form(ddof, size):
    for right in range(1, size):
        p = right / size
        deviation = math.sqrt(p * (1 - p) * size / (size - ddof))
        advantage = of([1.0] * right + [0.0] * (size - right), ddof=ddof, eps=0.0)
        assert advantage[0].item() == pytest.approx((1 - p) / deviation)
        assert advantage[-1].item() == pytest.approx(-p / deviation)


def test_eps_is_added_to_the_deviation():
    assert of([0.0, 1.0], eps=0.5).tolist() == pytest.approx([-0.5 / (0.5**0.5 + 0.5), 0.5 / (0.5**0.5 + 0.5)])


def test_without_std_it_is_the_difference_from_the_mean():
    assert of([1.0, 0.0, 0.0, 3.0], std=False).tolist() == [0.0, -1.0, -1.0, 2.0]


@pytest.mark.parametrize("reward", [0.1, 1 / 3, -7.7, 0.0])
def test_equal_rewards_give_exactly_zero(reward):
    assert of([reward] * 7).tolist() == [0.0] * 7
    assert of([reward] * 7, eps=0.0).tolist() == [0.0] * 7


def test_groups_do_not_see_each_other():
    both = of([1.0, 0.0, 5.0, 9.0, 4.0], [7, 7, 2, 2, 2])
    torch.testing.assert_close(both[:2], of([1.0, 0.0]))
    torch.testing.assert_close(both[2:], of([5.0, 9.0, 4.0]))


def test_invalid_samples_are_out_of_mean_and_deviation():
    rewards, valid = [1.0, float("nan"), 0.0, 0.5], [True, False, True, True]
    advantage = of(rewards, valid=valid)
    torch.testing.assert_close(advantage[[0, 2, 3]], of([1.0, 0.0, 0.5]))
    assert advantage[1] == 0


def test_a_group_under_min_group_is_dropped_and_gets_zero():
    group, valid = torch.tensor([0, 0, 0, 1, 1, 1]), torch.tensor([True, True, True, True, False, False])
    assert valid_groups(group, valid).tolist() == [True, True, True, False, False, False]
    assert valid_groups(group, valid, min_group=4).tolist() == [False] * 6
    assert valid_groups(group[1:3], valid[1:3]).tolist() == [True, True]  # two are enough
    advantage = of([1.0, 0.0, 0.0, 5.0, 2.0, 2.0], group.tolist(), valid.tolist())
    assert advantage[3:].tolist() == [0.0, 0.0, 0.0] and advantage[0] > 0


def test_the_dtype_of_the_rewards_is_kept():
    rewards = torch.tensor([1.0, 0.0], dtype=torch.float32)
    advantage = build_objective("grpo").advantages(rewards, torch.zeros(2).long(), torch.ones(2).bool())
    assert advantage.dtype == torch.float32
