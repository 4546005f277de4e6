"""Dr. GRPO: no deviation in the advantage, one constant length in the denominator."""

from dataclasses import replace

import pytest
import torch

from rltk.algorithms import Totals, build_objective
from tests.unit.algorithms import properties
from tests.unit.algorithms.tables import gradient, random_batch


def test_it_is_grpo_with_two_settings():
    batch = random_batch(0, ratio=0.3)
    dr = build_objective("dr_grpo")
    grpo = build_objective("grpo", std=False, aggregation="seq-mean-token-sum-norm")
    totals = Totals.of(batch.mask, max_length=30)
    torch.testing.assert_close(dr.loss(batch, totals)[0], grpo.loss(batch, totals)[0])
    torch.testing.assert_close(gradient(dr, batch, totals), gradient(grpo, batch, totals))
    assert dr.loss(batch, totals)[1]["clip/share"] > 0


def test_the_advantage_is_the_difference_from_the_mean():
    rewards, group = torch.tensor([1.0, 0.0, 0.0, 3.0, 5.0, 5.0]).double(), torch.tensor([0, 0, 0, 0, 1, 1])
    advantage = build_objective("dr_grpo").advantages(rewards, group, torch.ones(6).bool())
    assert advantage.tolist() == [0.0, -1.0, -1.0, 2.0, 0.0, 0.0]


def test_a_token_weighs_the_same_in_a_short_and_in_a_long_sequence():
    batch = random_batch(1)
    same = replace(batch, old=batch.new, advantage=torch.full((6,), -1.0).double())
    slopes = gradient(build_objective("dr_grpo"), same, Totals.of(batch.mask, max_length=40))
    assert batch.mask.sum(dim=1).unique().numel() > 1
    torch.testing.assert_close(slopes, torch.where(batch.mask, 1 / (6 * 40), 0.0).double())
    by_length = gradient(build_objective("grpo"), same)[batch.mask]
    assert by_length.max() > 1.2 * by_length.min()


def test_what_holds_for_every_objective():
    objective, batch = build_objective("dr_grpo"), properties.filled_batch(8, padding=True)
    properties.check_on_policy(objective, batch, batch.advantage[:, None])
    properties.check_masked_tokens(objective, batch)
    properties.check_order(objective, batch)
    properties.check_equal_rewards(objective, batch)
    properties.check_extremes(objective)
    properties.check_splits(lambda: build_objective("dr_grpo"), batch, [2, 2], [1, 4])


def test_the_configuration_and_its_values():
    properties.check_configuration("dr_grpo")
    objective = build_objective("dr_grpo")
    assert (objective.clip_low, objective.clip_high, objective.dual_clip, objective.beta) == (0.2, 0.2, None, 0.0)
    assert objective.std is False and objective.aggregation == "seq-mean-token-sum-norm"
    with pytest.raises(ValueError, match="clip_low=2.0"):
        build_objective("dr_grpo", clip_low=2.0)
