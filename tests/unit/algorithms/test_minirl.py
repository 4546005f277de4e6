"""MiniRL: its mask, its weight against the sampler, what is detached, and that it refuses corrections."""

import math
from dataclasses import replace

import pytest
import torch

from rltk.algorithms import build_correction, build_objective
from rltk.algorithms.registry import available
from tests.unit.algorithms import properties
from tests.unit.algorithms.tables import Table, gradient, make_batch, random_batch


@pytest.mark.parametrize(
    ("ratio", "advantage", "masked"),
    [
        (1.26, 1.0, False), (1.28, 1.0, True), (5.0, 1.0, True), (0.1, 1.0, False),
        (0.81, -1.0, False), (0.79, -1.0, True), (0.1, -1.0, True), (5.0, -1.0, False),
        (1.28, 0.5, True), (0.5, 0.5, False), (0.79, -0.5, True), (1.5, -0.5, False),
    ],
)  # fmt: skip
@pytest.mark.parametrize("gap", [-0.7, 0.0, 0.9])
def test_one_token(ratio, advantage, masked, gap):
    """gap = old - mu: the mask follows new/old, the weight new/mu."""
    old = torch.full((1, 1), -1.0).double()
    batch = make_batch(old + math.log(ratio), old, torch.tensor([advantage]).double(), mu=old - gap)
    objective = build_objective("minirl")
    weight = min(ratio * math.exp(gap), 5.0)
    expected = 0.0 if masked else -weight * advantage
    assert gradient(objective, batch).item() == pytest.approx(expected)  # of new alone: weight and mask are detached
    assert objective.loss(batch)[0].item() == pytest.approx(expected * batch.new.item())


def test_against_the_formula_on_a_batch():
    batch = random_batch(0, ratio=0.3)
    slopes, total = torch.zeros(6, 7).double(), 0.0
    for row, t in batch.mask.nonzero().tolist():
        advantage, new = batch.advantage[row].item(), batch.new[row, t].item()
        ratio = math.exp(new - batch.old[row, t].item())
        if (advantage > 0 and ratio > 1.27) or (advantage < 0 and ratio < 0.8):
            continue
        weight = math.exp(new - batch.mu[row, t].item())
        slopes[row, t] = -weight * advantage / 6
        total += -weight * advantage * new / 6
    objective = build_objective("minirl")
    torch.testing.assert_close(gradient(objective, batch), slopes)
    loss, metrics = objective.loss(batch)
    assert loss.item() == pytest.approx(total)
    assert 0 < metrics["clip/share"] < 1
    torch.testing.assert_close(metrics["clip/share"], metrics["clip/high"] + metrics["clip/low"])
    torch.testing.assert_close(metrics["weight/mean"], (batch.new - batch.mu)[batch.mask].exp().mean())


def test_shares_tell_high_from_low():
    old = torch.full((2, 2), -2.0).double()
    ratio = torch.tensor([[2.0, 0.5], [2.0, 0.5]]).double()
    batch = make_batch(
        old + ratio.log(), old, torch.tensor([1.0, -1.0]).double(), mu=old - torch.tensor([[1.0], [0.5]])
    )
    metrics = build_objective("minirl", clip_low=0.4).loss(batch)[1]
    assert (metrics["clip/high"].item(), metrics["clip/low"].item()) == (0.25, 0.25)
    assert metrics["clip/weight"].item() == 0.25  # 2e > 5, the others are not
    assert build_objective("minirl", cap=None).loss(batch)[1]["clip/weight"] == 0


def test_the_edges_of_the_window_are_inside_and_no_advantage_is_no_clip():
    old = torch.full((2, 1), -1.0).double()
    narrow = build_objective("minirl", clip_low=0.0, clip_high=0.0, cap=1.0)
    on_policy = make_batch(old, old, torch.tensor([1.0, -1.0]).double())
    metrics = narrow.loss(on_policy)[1]
    assert metrics["clip/share"] == 0 and metrics["clip/weight"] == 0
    assert gradient(narrow, on_policy).count_nonzero() == 2
    idle = make_batch(old + torch.tensor([[1.0], [-1.0]]), old, torch.zeros(2).double())
    assert narrow.loss(idle)[1]["clip/share"] == 0


@pytest.mark.parametrize(("cap", "weight"), [(5.0, 5.0), (2.0, 2.0), (None, math.exp(3.0))])
def test_the_weight_is_truncated(cap, weight):
    old = torch.full((1, 1), -1.0).double()
    batch = make_batch(old, old, torch.ones(1).double(), mu=old - 3.0)
    assert gradient(build_objective("minirl", cap=cap), batch).item() == pytest.approx(-weight)


def test_at_one_step_the_gradient_is_exact_whoever_sampled():
    policy = Table(0, vocabulary=4, steps=1)
    sampler, reward = policy.near(1, 0.3), torch.tensor([1.0, 0.0, -1.0, 0.5]).double()
    tokens = policy.sequences()
    logits = policy.logits.clone().requires_grad_()
    new, mu = policy.logprobs(tokens, logits), sampler.logprobs(tokens)
    batch = make_batch(new, new.detach(), reward * mu.exp()[:, 0], mu=mu)
    build_objective("minirl", cap=None, aggregation="token-sum").loss(batch)[0].backward()
    exact = torch.autograd.grad((policy.logprobs(tokens, logits).exp()[:, 0] * reward).sum(), logits)[0]
    torch.testing.assert_close(-logits.grad, exact)


def test_the_advantage_is_not_divided_by_the_deviation():
    rewards = torch.tensor([1.0, 0.0, 0.0, 0.0]).double()
    advantage = build_objective("minirl").advantages(rewards, torch.zeros(4).long(), torch.ones(4).bool())
    torch.testing.assert_close(advantage, torch.tensor([0.75, -0.25, -0.25, -0.25]).double())


def test_a_response_counts_by_its_sum_and_not_by_its_length():
    old = torch.full((2, 4), -1.0).double()
    batch = make_batch(old, old, torch.ones(2).double(), mask=torch.tensor([[1, 1, 1, 1], [1, 0, 0, 0]]))
    expected = torch.tensor([[-0.5] * 4, [-0.5, 0, 0, 0]]).double()
    torch.testing.assert_close(gradient(build_objective("minirl"), batch), expected)


def test_it_refuses_every_correction():
    for name in available("rltk.algorithms.corrections", type(build_correction("tis")).__mro__[1]):
        if name != "none":
            with pytest.raises(ValueError, match="MiniRL refuses correction=.*already corrects.*correction=none"):
                build_objective("minirl", correction=build_correction(name))
    assert build_objective("minirl", correction=build_correction("none")).correction is not None
    assert build_objective("grpo").refuses_corrections == ""


def test_against_the_sampler_the_mask_follows_mu_too():
    batch = random_batch(1, ratio=0.3)
    expected = gradient(build_objective("minirl"), replace(batch, old=batch.mu))
    torch.testing.assert_close(gradient(build_objective("minirl", reference="mu"), batch), expected)


def test_on_policy_the_gradient_is_the_policy_gradient():
    batch = random_batch(2)
    same = replace(batch, old=batch.new, mu=batch.new)
    expected = torch.where(batch.mask, -batch.advantage[:, None] / 6, 0.0)
    torch.testing.assert_close(gradient(build_objective("minirl"), same), expected)


@pytest.mark.parametrize("cap", [5.0, None])
def test_what_holds_for_every_objective(cap):
    objective, batch = build_objective("minirl", cap=cap), properties.filled_batch(3, ratio=0.3, padding=True)
    properties.check_masked_tokens(objective, batch)
    properties.check_order(objective, batch)
    properties.check_equal_rewards(objective, batch)
    properties.check_extremes(objective)
    properties.check_splits(lambda: build_objective("minirl", cap=cap), batch, [2, 2], [1, 4])


def test_the_configuration_and_its_values():
    properties.check_configuration("minirl")
    objective = build_objective("minirl")
    assert (objective.clip_low, objective.clip_high, objective.cap) == (0.2, 0.27, 5.0)
    assert objective.aggregation == "seq-mean-token-sum" and objective.std is False and objective.beta == 0
    with pytest.raises(ValueError, match="cap=0.5 .*a number >= 1 or null"):
        build_objective("minirl", cap=0.5)
