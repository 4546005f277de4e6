"""GRPO: the clipped token loss against its formula, its gradient, dual clip, and the ratio's reference."""

from dataclasses import replace

import pytest
import torch

from rltk.algorithms import build_correction, build_objective
from tests.unit.algorithms import properties
from tests.unit.algorithms.tables import Table, gradient, make_batch, random_batch


@pytest.mark.parametrize(
    ("ratio", "advantage", "dual", "loss", "slope"),
    [
        (1.0, 2.0, None, -2.0, -2.0),
        (1.1, 1.0, None, -1.1, -1.1),
        (1.5, 1.0, None, -1.3, 0.0),  # clipped above
        (0.5, 1.0, None, -0.5, -0.5),  # the pessimistic side stays
        (0.5, -1.0, None, 0.8, 0.0),  # clipped below
        (5.0, -1.0, None, 5.0, 5.0),  # no bound unless asked for
        (5.0, -1.0, 3.0, 3.0, 0.0),
        (2.0, -1.0, 3.0, 2.0, 2.0),
        (5.0, 1.0, 3.0, -1.3, 0.0),  # dual clip is for A < 0 only
    ],
)
def test_one_token(ratio, advantage, dual, loss, slope):
    old = torch.full((1, 1), -1.0, dtype=torch.float64)
    batch = make_batch(old + torch.tensor(ratio).double().log(), old, torch.tensor([advantage]).double())
    objective = build_objective("grpo", clip_high=0.3, dual_clip=dual)
    assert objective.loss(batch)[0].item() == pytest.approx(loss)
    assert gradient(objective, batch).item() == pytest.approx(slope)  # d r / d new = r


def test_clip_shares_tell_high_low_and_dual_apart():
    ratio = torch.tensor([[5.0, 1.1, 0.5, 1.0], [1.5, 0.5, 5.0, 0.9]]).double()
    old = torch.full_like(ratio, -1.0)
    batch = make_batch(old + ratio.log(), old, torch.tensor([1.0, -1.0]).double())
    metrics = build_objective("grpo", dual_clip=3.0).loss(batch)[1]
    shares = {name: metrics[f"clip/{name}"].item() * 8 for name in ("high", "low", "dual", "share", "outside")}
    assert shares == pytest.approx({"high": 1, "low": 1, "dual": 1, "share": 3, "outside": 5})


@pytest.mark.parametrize("name", ["grpo", "ctpo"])
def test_on_policy_the_gradient_is_the_policy_gradient(name):
    batch = random_batch(0)
    same = replace(batch, old=batch.new, mu=batch.new)
    expected = torch.where(batch.mask, -batch.advantage[:, None], 0.0)
    objective = build_objective(name, aggregation="token-sum", dual_clip=None)
    torch.testing.assert_close(gradient(objective, same), expected)


@pytest.mark.parametrize("name", ["grpo", "ctpo"])
def test_equal_rewards_give_no_gradient(name):
    objective, batch = build_objective(name), random_batch(1)
    advantage = objective.advantages(torch.full((6,), 0.1).double(), batch.group, torch.ones(6).bool())
    assert torch.equal(gradient(objective, replace(batch, advantage=advantage)), torch.zeros(6, 7).double())


@pytest.mark.parametrize("name", ["grpo", "ctpo"])
def test_what_the_mask_hides_changes_nothing(name):
    batch = random_batch(2)
    objective = build_objective(name, beta=0.1, correction=build_correction("tis", cap=1.1))
    zeroed = {f: torch.where(batch.mask, getattr(batch, f), 0.0) for f in ("new", "old", "mu", "ref")}
    loss, metrics = objective.loss(batch)
    clean, clean_metrics = objective.loss(replace(batch, **zeroed))
    assert loss.isfinite() and torch.equal(loss, clean)
    assert objective.token_loss(batch)[0].isfinite().all()
    assert all(torch.equal(metrics[key], clean_metrics[key]) for key in metrics)
    assert torch.equal(gradient(objective, batch), gradient(objective, replace(batch, **zeroed)))
    assert (gradient(objective, batch)[~batch.mask] == 0).all()


def test_token_advantages_are_taken_as_they_are():
    batch = random_batch(3)
    spread = batch.advantage[:, None].expand(-1, 7)
    objective = build_objective("grpo")
    torch.testing.assert_close(objective.loss(replace(batch, advantage=spread))[0], objective.loss(batch)[0])
    hidden = replace(batch, advantage=spread.masked_fill(~batch.mask, torch.nan))
    assert torch.equal(gradient(objective, hidden), gradient(objective, batch))
    assert objective.token_loss(hidden)[0].isfinite().all()
    one_token = torch.zeros(6, 7).double()
    one_token[0, 2] = 1.0
    assert gradient(objective, replace(batch, advantage=one_token)).count_nonzero() == 1


def test_against_the_sampler_the_ratio_is_new_over_mu():
    batch = random_batch(4)
    against_mu = build_objective("grpo", reference="mu")
    against_old = build_objective("grpo")
    torch.testing.assert_close(against_mu.loss(batch)[0], against_old.loss(replace(batch, old=batch.mu))[0])
    assert not torch.isclose(against_mu.loss(batch)[0], against_old.loss(batch)[0])


def test_at_one_step_the_off_policy_gradient_is_exact():
    """Inside the window, E_mu[r R grad log pi] is the gradient of E_pi[R], by listing every sequence."""
    policy = Table(3, vocabulary=4, steps=1)
    sampler, rewards = policy.near(4, 0.02), torch.tensor([0.0, 1.0, -0.5, 2.0]).double()
    logits = policy.logits.clone().requires_grad_()
    tokens = policy.sequences()
    new, mu = policy.logprobs(tokens, logits), sampler.logprobs(tokens)
    batch = make_batch(new, mu, rewards * mu.exp()[:, 0])
    build_objective("grpo", aggregation="token-sum").loss(batch)[0].backward()
    exact = torch.autograd.grad((policy.logprobs(tokens, logits).exp()[:, 0] * rewards).sum(), logits)[0]
    torch.testing.assert_close(-logits.grad, exact)


def test_what_holds_for_every_objective():
    objective, batch = build_objective("grpo"), properties.filled_batch(8, padding=True)
    properties.check_on_policy(objective, batch, batch.advantage[:, None])
    properties.check_masked_tokens(objective, batch)
    properties.check_order(objective, batch)
    properties.check_splits(lambda: build_objective("grpo"), batch, [2, 2], [1, 4])


def test_extreme_ratios_stay_finite():
    old = torch.tensor([[-900.0, -0.001, -50.0]])
    new = torch.tensor([[-0.001, -900.0, -50.0]])
    batch = make_batch(new, old, torch.tensor([-1.0]))
    loss, metrics = build_objective("grpo", beta=1.0).loss(replace(batch, ref=old))
    assert loss.isfinite() and metrics["log_ratio/square"] == pytest.approx(800 / 3)
    assert gradient(build_objective("grpo"), batch).isfinite().all()
