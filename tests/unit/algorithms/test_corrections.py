"""Corrections of the sampler's error: `none` and `tis`, and how the base loss applies any of them."""

from dataclasses import replace

import pytest
import torch

from rltk.algorithms import Correction, build_correction, build_objective
from tests.unit.algorithms.tables import Table, gradient, make_batch, random_batch


@pytest.mark.parametrize("name", ["grpo", "ctpo"])
def test_tis_does_nothing_where_the_sampler_is_the_learner(name):
    batch = random_batch(0)
    batch = replace(batch, mu=batch.old)
    plain, corrected = build_objective(name), build_objective(name, correction=build_correction("tis"))
    assert torch.equal(plain.loss(batch)[0], corrected.loss(batch)[0])
    assert torch.equal(gradient(plain, batch), gradient(corrected, batch))
    assert corrected.loss(batch)[1]["correction/tokens"] == 0


def test_tis_weights_are_capped_detached_and_one_under_mask_zero():
    batch = random_batch(1, ratio=0.8)
    weight, kept = build_correction("tis", cap=1.5)(batch)
    expected = torch.where(batch.mask, (batch.old - batch.mu).exp().clamp(max=1.5), 1.0)
    torch.testing.assert_close(weight, expected)
    assert (weight == 1.5).any() and not weight.requires_grad and torch.equal(kept & batch.mask, batch.mask)
    assert build_correction("tis").cap == 2.0


@pytest.mark.parametrize("gap", [25.0, -25.0])
def test_the_log_ratio_is_bounded_like_any(gap):
    old = torch.full((1, 2), -30.0).double()
    batch = make_batch(old, old, torch.ones(1).double(), mu=old - gap, mask=torch.tensor([[1, 0]]))
    bound = 20.0 if gap > 0 else -20.0
    assert Correction.log_ratio(batch).tolist() == [[bound, 0.0]]
    weight, _ = build_correction("tis", cap=1e300)(batch)
    assert weight[0, 0].log().item() == pytest.approx(bound)


def test_a_correction_asks_for_no_statistic_of_the_batch_unless_it_says_so():
    assert not Correction.batch_statistic and not DropFirstToken.batch_statistic


def test_a_weight_at_the_cap_is_not_truncated():
    batch = random_batch(2)
    objective = build_objective("grpo", correction=build_correction("tis", cap=1.0))
    assert objective.loss(replace(batch, mu=batch.old))[1]["correction/tokens"] == 0


def test_the_weight_multiplies_the_clipped_loss():
    """Clipping is decided by new against old alone; the weight scales what is left."""
    old = torch.full((1, 3), -1.0).double()
    new = old + torch.tensor([[0.5, 0.0, -0.5]]).double()
    mu = old - torch.tensor([[0.3, 5.0, -0.3]]).double()
    batch = make_batch(new, old, torch.ones(1).double(), mu=mu)
    objective = build_objective("grpo", aggregation="token-sum", correction=build_correction("tis"))
    weight = torch.tensor([0.3, 5.0, -0.3]).exp().clamp(max=2.0).double()
    expected = -(weight * torch.tensor([1.2, 1.0, torch.tensor(-0.5).exp()])).sum()
    assert objective.loss(batch)[0].item() == pytest.approx(expected.item(), rel=1e-6)
    assert gradient(objective, batch)[0, 0] == 0


def test_at_one_step_the_corrected_gradient_is_exact():
    """new = old, sampler elsewhere: without correction biased, with it (under the cap) the gradient of E_pi[R]."""
    policy = Table(0, vocabulary=4, steps=1)
    sampler, reward = policy.near(1, 0.3), torch.tensor([1.0, 0.0, -1.0, 0.5]).double()
    tokens = policy.sequences()
    logits = policy.logits.clone().requires_grad_()
    new, mu = policy.logprobs(tokens, logits), sampler.logprobs(tokens)
    batch = make_batch(new, new.detach(), reward * mu.exp()[:, 0], mu=mu)
    exact = torch.autograd.grad((policy.logprobs(tokens, logits).exp()[:, 0] * reward).sum(), logits)[0]

    def of(correction):
        loss = build_objective("grpo", aggregation="token-sum", correction=correction).loss(batch)[0]
        return -torch.autograd.grad(loss, logits, retain_graph=True)[0]

    torch.testing.assert_close(of(build_correction("tis", cap=50.0)), exact)
    assert (of(None) - exact).abs().max() > 1e-3


def test_it_reports_the_tokens_and_sequences_it_touched():
    old = torch.full((2, 4), -1.0).double()
    mu = old.clone()
    mu[0, 2], mu[0, 1], mu[1, 3] = -2.0, -1.1, -9.0  # e > 2 truncated, 1.1 not, the last one masked out
    mask = torch.tensor([[1, 1, 1, 1], [1, 1, 1, 0]])
    batch = make_batch(old, old, torch.ones(2).double(), mu=mu, mask=mask)
    metrics = build_objective("grpo", correction=build_correction("tis")).loss(batch)[1]
    assert metrics["correction/tokens"].item() == pytest.approx(1 / 7)
    assert metrics["correction/sequences"].item() == pytest.approx(1 / 2)
    assert metrics["correction/weight_max"].item() == 2.0
    assert metrics["correction/weight"].item() == pytest.approx((2 + torch.tensor(0.1).exp().item() + 5) / 7)


class LeaveOutFirstToken(Correction):
    """Keeps everything but the first token, which still counts in a sequence's length."""

    def __call__(self, batch):
        kept = torch.ones_like(batch.mask)
        kept[:, 0] = False
        return torch.ones_like(batch.old), kept


class DropFirstToken(LeaveOutFirstToken):
    """Counts only what it keeps as a sequence's length."""

    def lengths(self, batch, kept):
        return (batch.mask & kept).sum(dim=1)


def test_a_dropped_token_leaves_the_loss_but_not_the_totals():
    old = torch.full((1, 4), -1.0).double()
    batch = make_batch(old, old, torch.ones(1).double())
    of = {how: build_objective("grpo", aggregation=how, correction=DropFirstToken()) for how in
          ("token-mean", "seq-mean-token-sum", "seq-mean-token-mean")}  # fmt: skip
    assert of["token-mean"].loss(batch)[0].item() == pytest.approx(-3 / 4)
    assert of["seq-mean-token-sum"].loss(batch)[0].item() == pytest.approx(-3.0)
    assert of["seq-mean-token-mean"].loss(batch)[0].item() == pytest.approx(-1.0)  # by its own count
    assert of["token-mean"].loss(batch)[1]["correction/tokens"].item() == pytest.approx(1 / 4)
    assert build_objective("grpo", correction=LeaveOutFirstToken()).loss(batch)[0].item() == pytest.approx(-3 / 4)
    assert gradient(of["token-mean"], batch)[0, 0] == 0
    after_a_prompt = replace(batch, mask=torch.tensor([[0, 1, 1, 1]]))  # what it drops was no sampled token
    assert of["token-mean"].loss(after_a_prompt)[1]["correction/sequences"] == 0


def test_the_penalty_keeps_every_token_of_a_sequence_that_counts_fewer():
    batch = random_batch(9)
    free, held = (build_objective("grpo", beta=beta, correction=DropFirstToken()) for beta in (0.0, 0.4))
    log_ratio = torch.where(batch.mask, batch.new - batch.ref, 0.0)
    of_rows = ((-log_ratio).exp() + log_ratio - 1).sum(dim=1) / batch.mask.sum(dim=1)
    assert batch.mask[:, 0].any()  # what the correction drops
    torch.testing.assert_close(held.loss(batch)[0] - free.loss(batch)[0], 0.4 * of_rows.mean())


def test_none_reports_nothing():
    assert not any(k.startswith("correction") for k in build_objective("grpo").loss(random_batch(0))[1])


def test_against_the_sampler_no_correction_is_legal():
    with pytest.raises(ValueError, match="reference=mu.*TIS"):
        build_objective("grpo", reference="mu", correction=build_correction("tis"))
    assert build_objective("grpo", reference="mu", correction=build_correction("none")).reference == "mu"
    with pytest.raises(ValueError, match="build_correction"):
        build_objective("grpo", correction="tis")  # type: ignore[arg-type]


def test_prepare_reaches_the_correction():
    calls = []

    class Counting(DropFirstToken):
        def prepare(self, shard, reduce):
            calls.append(reduce(torch.ones(1)).item())

    build_objective("ctpo", correction=Counting()).prepare(random_batch(0), lambda value: 4 * value)
    assert calls == [4.0]
