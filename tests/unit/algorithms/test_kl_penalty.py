"""The KL penalty: values, gradients by enumeration, and that it is only asked for where it counts."""

import pytest
import torch

from rltk.algorithms import TokenBatch, Totals, build_correction, build_objective
from tests.unit.algorithms.tables import Table, random_batch

POLICY, REFERENCE = Table(0, steps=1, vocabulary=5), Table(1, steps=1, vocabulary=5)


def penalty(kind: str, logits: torch.Tensor) -> torch.Tensor:
    """Expectation of the penalty's surrogate: each token weighted by its (constant) probability under the policy."""
    tokens = POLICY.sequences()
    new, ref = POLICY.logprobs(tokens, logits), REFERENCE.logprobs(tokens)
    old, rows = new.detach(), len(tokens)
    group = torch.zeros(rows).long()
    objective = build_objective("grpo", beta=1.0, kl=kind, aggregation="token-sum")
    losses = [
        objective.loss(TokenBatch(n, o, o, torch.ones(1, 1), o.new_zeros(1), g, ref=r))[0]
        for n, o, r, g in zip(new.split(1), old.split(1), ref.split(1), group.split(1), strict=True)
    ]
    return (torch.stack(losses) * old[:, 0].exp()).sum()


def exact(logits: torch.Tensor, forward: bool) -> torch.Tensor:
    p, q = logits.log_softmax(-1).flatten(), REFERENCE.logits.log_softmax(-1).flatten()
    return (q.exp() * (q - p)).sum() if forward else (p.exp() * (p - q)).sum()


def grad(value: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
    return torch.autograd.grad(value, logits)[0]


@pytest.mark.parametrize("kind", ["k1", "k3"])
def test_the_mean_value_is_the_reverse_kl(kind):
    logits = POLICY.logits.clone().requires_grad_()
    torch.testing.assert_close(penalty(kind, logits), exact(logits, forward=False))


def test_k3_has_the_gradient_of_the_forward_kl_and_k2_of_the_reverse():
    logits = POLICY.logits.clone().requires_grad_()
    forward, reverse = grad(exact(logits, True), logits), grad(exact(logits, False), logits)
    torch.testing.assert_close(grad(penalty("k3", logits), logits), forward)
    torch.testing.assert_close(grad(penalty("k2", logits), logits), reverse)
    assert (forward - reverse).abs().max() > 0.05  # so the two lines above differ


def test_k1_restrains_nothing_on_average():
    logits = POLICY.logits.clone().requires_grad_()
    torch.testing.assert_close(grad(penalty("k1", logits), logits), torch.zeros_like(logits))


@pytest.mark.parametrize("name", ["grpo", "ctpo"])
def test_the_reference_is_needed_only_with_beta(name):
    assert build_objective(name).needs == frozenset()
    assert build_objective(name, beta=0.1).needs == {"ref"}
    assert "kl/ref" not in build_objective(name).loss(random_batch(0))[1]


def test_the_penalty_is_aggregated_over_sampled_tokens():
    batch = random_batch(6)
    assert batch.mask.sum(dim=1).unique().numel() > 1
    log_ratio = torch.where(batch.mask, batch.new - batch.ref, 0.0)
    of_rows = ((-log_ratio).exp() + log_ratio - 1).sum(dim=1)
    lengths, totals = batch.mask.sum(dim=1), Totals.of(batch.mask, max_length=50)
    expected = {
        "token-mean": of_rows.sum() / lengths.sum(),
        "seq-mean-token-mean": (of_rows / lengths).mean(),
        "seq-mean-token-sum": of_rows.mean(),
        "seq-mean-token-sum-norm": of_rows.mean() / 50,
        "token-sum": of_rows.sum(),
    }
    for how, value in expected.items():
        free, held = (build_objective("grpo", aggregation=how, beta=beta) for beta in (0.0, 0.4))
        alone, held = free.loss(batch, totals)[0], held.loss(batch, totals)[0]
        torch.testing.assert_close(held - alone, 0.4 * value, msg=how)


def test_beta_scales_the_penalty_and_the_correction_does_not_touch_it():
    batch = random_batch(5)
    plain = build_objective("grpo", correction=build_correction("tis")).loss(batch)[0]
    for beta in (0.1, 0.7):
        loss, metrics = build_objective(
            "grpo", beta=beta, aggregation="token-mean", correction=build_correction("tis")
        ).loss(batch)
        alone = build_objective("grpo", aggregation="token-mean", correction=build_correction("tis")).loss(batch)[0]
        torch.testing.assert_close(loss - alone, beta * metrics["kl/ref"])
    assert plain.isfinite()
