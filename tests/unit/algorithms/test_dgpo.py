"""DGPO: the token weights against their formula, their bounds and limits, and that they are constants."""

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rltk.algorithms import build_objective
from tests.unit.algorithms import properties
from tests.unit.algorithms.tables import gradient


def weights(batch, tau=0.5, kappa=1.0):
    """|y| softmax(H2 Ent^kappa / tau) of each token, in plain Python; 0 where the mask is 0."""
    table = torch.zeros_like(batch.old)
    for row in range(len(batch.old)):
        places = batch.mask[row].nonzero().flatten().tolist()
        score = {t: batch.hellinger[row, t].item() * batch.entropy[row, t].item() ** kappa / tau for t in places}
        total = sum(math.exp(value) for value in score.values())
        for t in places:
            table[row, t] = len(places) * math.exp(score[t]) / total
    return table


@pytest.mark.parametrize("options", [{}, {"tau": 0.1}, {"kappa": 0.0}, {"tau": 2.0, "kappa": 2.5}])
def test_it_is_grpo_with_the_weighted_advantage(options):
    """Clipping, dual clip and all."""
    batch = properties.filled_batch(0, ratio=0.3)
    shared = replace(batch, advantage=weights(batch, **options) * batch.advantage[:, None])
    for dual in (None, 1.2):
        clip = {"clip_low": 0.15, "clip_high": 0.25, "dual_clip": dual}
        dgpo, grpo = build_objective("dgpo", **clip, **options), build_objective("grpo", **clip)
        loss, metrics = dgpo.loss(batch)
        expected, theirs = grpo.loss(shared)
        torch.testing.assert_close(loss, expected)
        torch.testing.assert_close(gradient(dgpo, batch), gradient(grpo, shared))
        assert all(torch.equal(metrics[name], theirs[name]) for name in theirs) and metrics["clip/share"] > 0


@given(seed=st.integers(0, 10_000), tau=st.floats(0.05, 20.0), kappa=st.floats(0.0, 3.0))
@settings(max_examples=30, deadline=None)
def test_the_weights_have_mean_one_and_a_bounded_spread(seed, tau, kappa):
    batch = replace(properties.filled_batch(seed), advantage=torch.ones(6).double())
    objective = build_objective("dgpo", tau=tau, kappa=kappa)
    given_to = objective.token_loss(replace(batch, new=batch.old))[0].neg()  # at ratio 1 the loss is minus the weight
    for row in range(6):
        own = given_to[row, batch.mask[row]]
        assert own.mean().item() == pytest.approx(1.0, abs=1e-12)
        assert (own.max() / own.min()).item() <= math.exp(1 / tau) * (1 + 1e-9)


def test_where_the_policy_is_the_reference_it_is_grpo_and_so_with_a_large_tau():
    batch = properties.filled_batch(1)
    grpo = gradient(build_objective("grpo"), batch)
    at_reference = replace(batch, hellinger=batch.hellinger * 0.0)
    torch.testing.assert_close(gradient(build_objective("dgpo"), at_reference), grpo)
    torch.testing.assert_close(gradient(build_objective("dgpo", tau=1e9), batch), grpo)
    assert not torch.allclose(gradient(build_objective("dgpo"), batch), grpo)


def test_a_token_counts_for_more_where_the_policy_has_moved_and_is_unsure():
    batch = properties.filled_batch(2, rows=1)
    first, second = batch.mask[0].nonzero().flatten().tolist()[:2]
    table = {name: torch.where(batch.mask, 0.5, torch.nan).double() for name in ("hellinger", "entropy")}
    for name in table:
        more = table[name].clone()
        more[0, first] = 0.9
        slopes = gradient(build_objective("dgpo"), replace(batch, new=batch.old, **{**table, name: more}))[0].abs()
        assert slopes[first] > slopes[second] > 0


def test_the_weights_carry_no_gradient():
    batch = properties.filled_batch(3)
    hellinger, entropy = (value.clone().requires_grad_() for value in (batch.hellinger, batch.entropy))
    new = batch.new.clone().requires_grad_()
    loss = build_objective("dgpo").loss(replace(batch, new=new, hellinger=hellinger, entropy=entropy))[0]
    found = torch.autograd.grad(loss, [new, hellinger, entropy], allow_unused=True)
    assert found[0] is not None and found[1] is None and found[2] is None


def test_rounding_beyond_zero_and_one_does_no_harm():
    batch = properties.filled_batch(4)
    objective = build_objective("dgpo", kappa=0.5)
    names = ("entropy", "hellinger")
    for name, other in (names, reversed(names)):
        for past, at in ((-1e-7, 0.0), (1.0001, 1.0)):
            table, edge = (torch.where(batch.mask, value, torch.nan).double() for value in (past, at))
            half = torch.where(batch.mask & (batch.hellinger > 0.5), 0.5, 1.0).double()
            beyond = objective.loss(replace(batch, **{name: torch.where(half < 1, table, half), other: half}))[0]
            expected = objective.loss(replace(batch, **{name: torch.where(half < 1, edge, half), other: half}))[0]
            assert beyond.isfinite() and torch.equal(beyond, expected)


def test_what_it_needs_and_what_it_logs():
    batch = properties.filled_batch(5)
    objective = build_objective("dgpo")
    assert objective.needs == build_objective("dgpo", beta=0.1).needs == {"ref", "hellinger", "entropy"}
    for name in objective.needs:
        with pytest.raises(ValueError, match=f"needs {name}"):
            objective.loss(replace(batch, **{name: None}))
    metrics, expected = objective.loss(batch)[1], weights(batch)[batch.mask]
    torch.testing.assert_close(metrics["weight/square"], (expected**2).mean())
    torch.testing.assert_close(metrics["weight/token_max"], expected.max())
    torch.testing.assert_close(metrics["hellinger/mean"], batch.hellinger[batch.mask].mean())


def test_what_holds_for_every_objective():
    objective, batch = build_objective("dgpo"), properties.filled_batch(8, padding=True)
    properties.check_on_policy(objective, batch, weights(batch) * batch.advantage[:, None])
    properties.check_masked_tokens(objective, batch)
    properties.check_order(objective, batch)
    properties.check_equal_rewards(objective, batch)
    properties.check_extremes(objective)
    properties.check_splits(lambda: build_objective("dgpo"), batch, [2, 2], [1, 4])


def test_the_configuration_and_its_values():
    properties.check_configuration("dgpo")
    objective = build_objective("dgpo")
    assert (objective.tau, objective.kappa, objective.beta, objective.dual_clip) == (0.5, 1.0, 0.0, None)
    assert (objective.clip_low, objective.clip_high) == (0.2, 0.2) and objective.aggregation == "seq-mean-token-mean"
    for wrong in ({"tau": 0.0}, {"kappa": -0.1}):
        with pytest.raises(ValueError, match="a number >"):
            build_objective("dgpo", **wrong)
