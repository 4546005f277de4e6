"""What an objective is before it is a method: the hooks that the base class answers for it."""

from dataclasses import replace

import pytest
import torch

from rltk.algorithms import Correction, Objective, Totals, build_correction, build_objective
from tests.unit.algorithms.tables import gradient, random_batch


class Nothing(Objective):
    """A subclass that overrides no hook."""


def test_the_hooks_a_method_leaves_alone():
    assert Nothing.default_minibatches == 1 and Nothing.refuses_corrections == ""
    assert Nothing().admit([]) is True and Nothing().prompt_sampler() is None and Nothing().needs == frozenset()
    batch = random_batch(0)
    assert Nothing().prepare(batch) is batch


def test_a_method_without_a_loss_says_so():
    with pytest.raises(NotImplementedError, match="Nothing has no loss: write token_loss"):
        Nothing().loss(random_batch(0))


@pytest.mark.parametrize("name", ["grpo", "ctpo"])
def test_metrics_and_nothing_else_come_without_gradient(name):
    batch = random_batch(1)
    batch.new.requires_grad_()
    loss, metrics = build_objective(name, beta=0.1).loss(batch)
    assert loss.requires_grad and not any(value.requires_grad for value in metrics.values())
    assert all(isinstance(value, torch.Tensor) and value.shape == () for value in metrics.values())


@pytest.mark.parametrize("kl", ["k1", "k2", "k3"])
def test_what_a_method_is_handed_is_neutral_under_the_mask(kl):
    """Whatever stands there, even in `ref`: log-ratio 0, ratio 1, advantage 0, penalty 0."""
    batch = random_batch(2)
    hidden = ~batch.mask
    batch = replace(batch, ref=batch.ref.masked_fill(hidden, torch.inf))
    objective = build_objective("grpo", beta=0.3, kl=kl)
    advantage = objective.token_advantage(batch)
    assert (objective.log_ratio(batch)[hidden] == 0).all() and (objective.ratio(batch)[hidden] == 1).all()
    assert (advantage[hidden] == 0).all() and (objective.penalty(batch)[0][hidden] == 0).all()
    assert torch.equal(advantage[batch.mask], batch.advantage[:, None].expand(6, 7)[batch.mask])


class WeightOfNow(Correction):
    """A user's correction that forgets to detach: its weight follows the policy that learns."""

    def __call__(self, batch):
        return torch.where(batch.mask, batch.new, 0.0).exp(), batch.mask


def test_no_gradient_passes_through_a_correction():
    batch = random_batch(3)
    corrected = build_objective("grpo", aggregation="token-sum", correction=WeightOfNow())
    plain = gradient(build_objective("grpo", aggregation="token-sum"), batch)
    expected = torch.where(batch.mask, plain * batch.new.exp(), 0.0)
    torch.testing.assert_close(gradient(corrected, batch), expected)


class LengthOfRow(Objective):
    """Logs a figure of sequences, and has one in rows without a token as well."""

    def token_loss(self, batch):
        return torch.where(batch.mask, batch.new, 0.0), {"row": 1.0 + batch.group.double()}


def test_a_figure_of_sequences_is_a_mean_over_those_that_have_a_token():
    batch = random_batch(4)
    batch = replace(batch, mask=batch.mask & (torch.arange(6)[:, None] != 5), group=torch.tensor([0, 1, 2, 3, 4, 1000]))
    assert not batch.mask.all(dim=1).all()
    assert LengthOfRow().loss(batch)[1]["row"].item() == pytest.approx((1 + 2 + 3 + 4 + 5) / 5)


def test_a_micro_batch_without_a_row_adds_nothing():
    batch = random_batch(5).select(slice(0, 0))
    loss, metrics = build_objective("grpo", correction=build_correction("tis")).loss(batch, Totals(8, 2, 4))
    assert loss.item() == 0 and metrics.pop("correction/weight_max").item() == -torch.inf
    assert all(value.item() == 0 for value in metrics.values())
