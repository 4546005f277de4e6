"""CISPO: the clipped weight, that it is a constant, and that no token loses its gradient."""

import pytest
import torch

from rltk.algorithms import build_objective
from tests.unit.algorithms import properties
from tests.unit.algorithms.tables import Table, gradient, make_batch, random_batch


@pytest.mark.parametrize(
    ("ratio", "advantage", "options", "weight"),
    [
        (1.0, 2.0, {}, 1.0),
        (4.9, 1.0, {}, 4.9),
        (6.0, 1.0, {}, 5.0),
        (6.0, -1.0, {}, 5.0),  # whatever the advantage's sign
        (0.01, 1.0, {}, 0.01),  # open below
        (0.01, -1.0, {}, 0.01),
        (0.5, 1.0, {"clip_low": 0.2, "clip_high": 0.28}, 0.8),
        (0.5, -1.0, {"clip_low": 0.2, "clip_high": 0.28}, 0.8),
        (1.5, 1.0, {"clip_low": 0.2, "clip_high": 0.28}, 1.28),
        (4.0, -1.0, {"dual_clip": 3.0}, 3.0),
        (4.0, 1.0, {"dual_clip": 3.0}, 4.0),  # dual clip is for A < 0 only
        (4.0, 0.5, {"dual_clip": 3.0}, 4.0),
        (4.0, 0.0, {"dual_clip": 3.0}, 4.0),
        (2.0, -1.0, {"dual_clip": 3.0}, 2.0),
        (1.0, 1.0, {"clip_low": 0.0, "clip_high": 0.0}, 1.0),  # the edges are inside
    ],
)
def test_one_token(ratio, advantage, options, weight):
    new = torch.full((1, 1), -1.25, dtype=torch.float64)
    batch = make_batch(new, new - torch.tensor(ratio).double().log(), torch.tensor([advantage]).double())
    objective = build_objective("cispo", **options)
    loss, metrics = objective.loss(batch)
    assert loss.item() == pytest.approx(-weight * advantage * -1.25)
    assert gradient(objective, batch).item() == pytest.approx(-weight * advantage)
    assert metrics["weight/mean"].item() == pytest.approx(weight)
    high, low = 1 + objective.clip_high, 1 - objective.clip_low
    assert metrics["clip/outside"].item() == float(not low <= ratio <= high)


def test_every_token_keeps_its_gradient_where_grpo_drops_some():
    batch = random_batch(0, ratio=1.0)
    same = {"clip_low": 0.2, "clip_high": 0.28, "aggregation": "token-sum"}
    kept = gradient(build_objective("cispo", **same), batch)
    assert torch.equal(kept != 0, batch.mask)
    assert (gradient(build_objective("grpo", **same), batch) != 0).sum() < batch.mask.sum()


def test_inside_the_window_the_gradient_is_grpos():
    batch = random_batch(1, ratio=0.01)
    same = {"clip_low": 0.2, "clip_high": 0.2, "aggregation": "token-mean"}
    expected = gradient(build_objective("grpo", **same), batch)
    torch.testing.assert_close(gradient(build_objective("cispo", **same), batch), expected)


def test_at_one_step_the_off_policy_gradient_is_exact():
    """Below the cap, E_mu[sg[r] R grad log pi] is the gradient of E_pi[R], by listing every token."""
    policy = Table(3, vocabulary=4, steps=1)
    sampler, rewards = policy.near(4, 0.3), torch.tensor([0.0, 1.0, -0.5, 2.0]).double()
    logits, tokens = policy.logits.clone().requires_grad_(), policy.sequences()
    new, mu = policy.logprobs(tokens, logits), sampler.logprobs(tokens)
    loss = build_objective("cispo", aggregation="token-sum").loss(make_batch(new, mu, rewards * mu.exp()[:, 0]))[0]
    exact = torch.autograd.grad((policy.logprobs(tokens, logits).exp()[:, 0] * rewards).sum(), logits)[0]
    torch.testing.assert_close(-torch.autograd.grad(loss, logits)[0], exact)


def test_what_holds_for_every_objective():
    objective, batch = build_objective("cispo"), properties.filled_batch(8, padding=True)
    properties.check_on_policy(objective, batch, batch.advantage[:, None])
    properties.check_masked_tokens(objective, batch)
    properties.check_order(objective, batch)
    properties.check_equal_rewards(objective, batch)
    properties.check_extremes(objective)
    properties.check_splits(lambda: build_objective("cispo"), batch, [2, 2], [1, 4])


def test_the_configuration_and_its_values():
    properties.check_configuration("cispo")
    objective = build_objective("cispo")
    assert (objective.clip_low, objective.clip_high, objective.dual_clip) == (1.0, 4.0, None)
    assert objective.aggregation == "token-mean" and objective.needs == frozenset()
