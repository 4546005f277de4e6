"""DAPO: its loss, the soft penalty on length, and which groups are refused."""

from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rltk.algorithms import build_objective
from rltk.algorithms.overlong import overlong_penalty
from rltk.compose import load
from tests.unit.algorithms import properties
from tests.unit.algorithms.tables import gradient, random_batch

SHORT = {"max_length": 20, "overlong_buffer": 8}


def group_of(values, lengths=None, correct=None):
    lengths = [3] * len(values) if lengths is None else lengths
    records = [SimpleNamespace(value=v, correct=correct, flawed=None) for v in values]
    return [SimpleNamespace(reward=r, length=n) for r, n in zip(records, lengths, strict=True)]


def test_the_loss_is_grpos_with_its_settings():
    batch = random_batch(0, ratio=0.5)
    same = {"clip_low": 0.2, "clip_high": 0.28, "dual_clip": 10.0, "aggregation": "token-mean"}
    dapo, grpo = build_objective("dapo"), build_objective("grpo", **same)
    torch.testing.assert_close(dapo.loss(batch)[0], grpo.loss(batch)[0])
    torch.testing.assert_close(gradient(dapo, batch), gradient(grpo, batch))
    assert dapo.loss(batch)[1]["clip/share"] > 0


@pytest.mark.parametrize(
    ("length", "penalty"),
    [(0, 0.0), (11, 0.0), (12, 0.0), (13, -0.125), (16, -0.5), (19, -0.875), (20, -1.0), (21, -1.0), (500, -1.0)],
)
def test_the_penalty_is_soft(length, penalty):
    assert overlong_penalty(torch.tensor([length]), 20, 8).tolist() == [penalty]


@given(st.integers(1, 100), st.integers(0, 120), st.integers(0, 150))
@settings(max_examples=60, deadline=None)
def test_the_penalty_by_its_formula(max_length, buffer, length):
    on = 0 < buffer < max_length
    expected = max(-1.0, min(-(length - (max_length - buffer)) / buffer, 0.0)) if on else 0.0
    assert overlong_penalty(torch.tensor([length]), max_length, buffer).item() == pytest.approx(expected)


def test_a_buffer_as_long_as_the_limit_is_off_and_one_shorter_by_a_token_is_on():
    assert overlong_penalty(torch.tensor([8]), 8, 8).item() == 0.0
    assert overlong_penalty(torch.tensor([8]), 8, 7).item() == -1.0
    assert overlong_penalty(torch.tensor([19, 20]), 20, 1).tolist() == [0.0, -1.0]


def test_rewards_carry_the_penalty_and_none_stays_none():
    group = [*group_of([1.0, 0.0, None, -1.0], [12, 16, 20, 30]), SimpleNamespace(reward=None, length=20)]
    assert build_objective("dapo", **SHORT).shape_rewards(group) == [1.0, -0.5, None, -2.0, None]
    assert build_objective("dapo", max_length=20, overlong_buffer=0).shape_rewards(group)[:2] == [1.0, 0.0]
    published = build_objective("dapo").shape_rewards(group_of([1.0, 1.0], [16384, 18432]))
    assert published == [1.0, 0.5]


@pytest.mark.parametrize(
    ("values", "admitted"),
    [
        ([1.0, 0.0, 0.0], True),
        ([1.0, 1.0, 1.0], False),
        ([0.0, 0.0, 0.0], False),
        ([0.1, 0.1], False),
        ([0.3, 0.4], True),  # a graded reward teaches, whether or not an answer is right
        ([1.0, None, 0.0], True),
        ([1.0, None, 1.0], False),  # nobody could tell: no contrast
        ([1.0, None], False),
        ([None, None], False),
        ([], False),
    ],
)
def test_groups_of_equal_rewards_are_refused(values, admitted):
    assert build_objective("dapo").admit(group_of(values, correct=False)) is admitted
    assert build_objective("dapo", dynamic_sampling=False).admit(group_of(values)) is True
    assert build_objective("grpo").admit(group_of(values)) is True


def test_lengths_alone_do_not_make_a_group_admissible_and_few_scored_samples_do_not():
    objective = build_objective("dapo", **SHORT)
    alike = group_of([1.0, 1.0], [5, 20])
    assert objective.shape_rewards(alike) == [1.0, 0.0] and not objective.admit(alike)
    assert build_objective("dapo", min_group=3).admit(group_of([1.0, 0.0, 0.0]))
    assert not build_objective("dapo", min_group=3).admit(group_of([1.0, 0.0, None]))


def test_the_penalty_is_logged_where_it_is_on():
    batch = properties.filled_batch(1, padding=True)
    metrics = build_objective("dapo", max_length=7, overlong_buffer=5).loss(batch)[1]
    lengths = [int(row.sum()) for row in batch.mask if row.any()]
    expected = sum(max(-1.0, min(-(n - 2) / 5, 0.0)) for n in lengths) / len(lengths)
    assert metrics["overlong/penalty"].item() == pytest.approx(expected) and expected < 0
    assert "overlong/penalty" not in build_objective("dapo", max_length=7, overlong_buffer=7).loss(batch)[1]


@pytest.mark.parametrize("name", ["dapo", "fapo"])
def test_a_runs_configuration_knows_its_longest_response(name):
    def objective(*settings):
        return build_objective(name, **load([f"algorithm={name}", *settings]).algorithm.options)

    short = objective()
    assert short.max_length == load([]).task.max_response_tokens == 64 and short.overlong_buffer == 4096
    assert overlong_penalty(torch.tensor([64]), short.max_length, short.overlong_buffer).item() == 0.0  # off
    assert objective("task.max_response_tokens=9000").max_length == 9000
    assert objective("algorithm.overlong_buffer=16", "algorithm.max_length=48").max_length == 48


def test_what_holds_for_every_objective():
    options = {"max_length": 7, "overlong_buffer": 5}
    objective, batch = build_objective("dapo", **options), properties.filled_batch(8, padding=True)
    properties.check_on_policy(objective, batch, batch.advantage[:, None])
    properties.check_masked_tokens(objective, batch)
    properties.check_order(objective, batch)
    properties.check_equal_rewards(objective, batch)
    properties.check_extremes(objective)
    properties.check_splits(lambda: build_objective("dapo", **options), batch, [2, 2], [1, 4])


def test_the_configuration_and_its_values():
    properties.check_configuration("dapo")
    objective = build_objective("dapo")
    assert (objective.clip_low, objective.clip_high, objective.dual_clip, objective.beta) == (0.2, 0.28, 10.0, 0.0)
    assert (objective.max_length, objective.overlong_buffer, objective.dynamic_sampling) == (20480, 4096, True)
    assert objective.aggregation == "token-mean" and objective.std is True
    for wrong in ({"max_length": 0}, {"max_length": None}, {"overlong_buffer": -1}, {"overlong_buffer": 0.2}):
        with pytest.raises(ValueError, match="an integer >="):
            build_objective("dapo", **wrong)
