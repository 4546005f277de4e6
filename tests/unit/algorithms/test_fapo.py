"""FAPO: rewards from the record's labels, and what the paper's algebra says of the advantages they lead to."""

from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rltk.algorithms import build_objective
from tests.unit.algorithms import properties
from tests.unit.algorithms.tables import gradient, random_batch

COUNTS = st.integers(1, 12)  # samples of a kind: sound, flawed, wrong


def sample(correct, flawed=None, length=3, value=0.25):
    return SimpleNamespace(reward=SimpleNamespace(value=value, correct=correct, flawed=flawed), length=length)


def group_of(sound, flawed, wrong):
    return [sample(True, False)] * sound + [sample(True, True)] * flawed + [sample(False, False)] * wrong


def advantages(objective, group):
    rewards = torch.tensor(objective.shape_rewards(group)).double()
    return objective.advantages(rewards, torch.zeros(len(group)).long(), torch.ones(len(group)).bool())


def test_the_reward_comes_from_the_labels():
    group = [sample(True, False), sample(True, True), sample(False, False), sample(False, True)]
    assert build_objective("fapo").shape_rewards(group) == [1.0, 0.0, -1.0, -1.0]  # a wrong answer's steps do not count
    assert build_objective("fapo", flaw_penalty=0.25).shape_rewards(group) == [1.0, 0.75, -1.0, -1.0]
    assert build_objective("fapo", flaw_penalty=2).shape_rewards(group) == [1.0, -1.0, -1.0, -1.0]


def test_unchecked_answers_count_as_sound_and_unscored_ones_not_at_all():
    group = [sample(True, None), sample(False, None), sample(True, value=None), SimpleNamespace(reward=None, length=9)]
    assert build_objective("fapo").shape_rewards(group) == [1.0, -1.0, None, None]


def test_a_score_that_does_not_say_whether_it_is_right_is_refused():
    with pytest.raises(ValueError, match="reward 0.25 does not say .*set `correct`"):
        build_objective("fapo").shape_rewards([sample(True), sample(None)])


def test_the_length_penalty_is_added_as_in_dapo():
    group = [sample(True, True, 16), sample(False, None, 20), sample(True, None, 12)]
    assert build_objective("fapo", max_length=20, overlong_buffer=8).shape_rewards(group) == [-0.5, -2.0, 1.0]
    assert build_objective("fapo").shape_rewards([sample(True, None, 6144)]) == [0.5]  # the release's 8192 and 4096


def test_without_a_penalty_for_flaws_it_is_grpo():
    group = group_of(3, 2, 4)
    binary = torch.tensor([float(s.reward.correct) for s in group]).double()
    grpo = build_objective("grpo", eps=0.0)
    expected = grpo.advantages(binary, torch.zeros(9).long(), torch.ones(9).bool())
    torch.testing.assert_close(advantages(build_objective("fapo", flaw_penalty=0.0, eps=0.0), group), expected)
    batch = random_batch(0, ratio=0.5)
    same = {"clip_low": 0.2, "clip_high": 0.28, "dual_clip": 10.0, "aggregation": "token-mean"}
    torch.testing.assert_close(
        gradient(build_objective("fapo"), batch), gradient(build_objective("grpo", **same), batch)
    )


@given(COUNTS, COUNTS, COUNTS, st.sampled_from([0.25, 0.5, 1.0, 1.5, 2.0]))
@settings(max_examples=60, deadline=None)
def test_mean_turning_point_and_variance(sound, flawed, wrong, penalty):
    group, size = group_of(sound, flawed, wrong), sound + flawed + wrong
    alpha, beta, gamma = sound / size, wrong / size, flawed / size
    objective = build_objective("fapo", flaw_penalty=penalty, std=False)
    rewards = torch.tensor(objective.shape_rewards(group)).double()
    assert rewards.mean().item() == pytest.approx(1 - 2 * beta - penalty * gamma)

    flaw = advantages(objective, group)[sound].item()
    turn = alpha / beta - (2 / penalty - 1)  # the flawed advantage is negative iff this is positive
    assert abs(flaw) < 1e-12 if abs(turn) < 1e-12 else (flaw < 0) == (turn > 0)

    plain = torch.tensor(build_objective("fapo", flaw_penalty=0.0).shape_rewards(group)).double()
    more = (rewards.var(correction=0) - plain.var(correction=0)).item()
    turn = alpha / beta - (4 / penalty - 1)
    assert abs(more) < 1e-12 if abs(turn) < 1e-12 else (more > 0) == (turn > 0)


def test_by_default_flawed_answers_turn_bad_when_sound_ones_outnumber_wrong_ones():
    signs = [advantages(build_objective("fapo"), group_of(sound, 2, 4))[sound].sign().item() for sound in (3, 4, 5)]
    assert signs == [1.0, 0.0, -1.0]


def test_the_penalty_on_length_is_logged_where_it_is_on():
    batch = random_batch(1)
    metrics = build_objective("fapo", max_length=7, overlong_buffer=6).loss(batch)[1]
    lengths = batch.mask.sum(dim=1).double()
    torch.testing.assert_close(metrics["overlong/penalty"], ((1 - lengths) / 6).clamp(-1, 0).mean())
    assert set(build_objective("fapo", overlong_buffer=0).loss(batch)[1]) == set(build_objective("grpo").loss(batch)[1])


def test_what_holds_for_every_objective():
    options = {"max_length": 7, "overlong_buffer": 5}
    objective, batch = build_objective("fapo", **options), properties.filled_batch(8, padding=True)
    properties.check_on_policy(objective, batch, batch.advantage[:, None])
    properties.check_masked_tokens(objective, batch)
    properties.check_order(objective, batch)
    properties.check_equal_rewards(objective, batch)
    properties.check_extremes(objective)
    properties.check_splits(lambda: build_objective("fapo", **options), batch, [2, 2], [1, 4])


def test_the_configuration_and_its_values():
    properties.check_configuration("fapo")
    objective = build_objective("fapo")
    assert (objective.clip_low, objective.clip_high, objective.dual_clip, objective.beta) == (0.2, 0.28, 10.0, 0.0)
    assert (objective.flaw_penalty, objective.max_length, objective.overlong_buffer) == (1.0, 8192, 4096)
    assert objective.aggregation == "token-mean" and objective.std is True and objective.admit(group_of(2, 0, 0))
    for wrong in ({"flaw_penalty": -0.1}, {"flaw_penalty": 2.1}):
        with pytest.raises(ValueError, match="flaw_penalty=.*a number >= 0 and <= 2"):
            build_objective("fapo", **wrong)
