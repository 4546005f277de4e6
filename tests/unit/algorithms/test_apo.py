"""APO: the KL weight of right answers, the length factor of wrong ones, and GRPO for the rest."""

import math
from dataclasses import replace

import pytest
import torch

from rltk.algorithms import TokenBatch, Totals, build_objective
from tests.unit.algorithms import properties
from tests.unit.algorithms.tables import gradient, random_batch, with_needs

ROWS = 6


def batch_of(seed=0, **fields):
    batch = with_needs(random_batch(seed), seed)
    return replace(batch, **{name: torch.tensor(value).double() for name, value in fields.items()})


def penalties(objective, batch):
    """Each sequence's share of the KL penalty in the loss: token-sum with an advantage that only chooses the side."""
    values, _ = objective.penalty(batch)
    return torch.where(batch.mask, values, 0.0)


def advantages(batch, growth=1.00001):
    """The method's own A_t `[B, T]`, read off the gradient of new = old: minus the advantage of each token."""
    objective = build_objective("apo", growth=growth, beta=0.0, aggregation="token-sum")
    return -gradient(objective, replace(batch, old=batch.new, mu=batch.new))


@pytest.mark.parametrize(
    ("advantage", "pass_rate", "weight"),
    [
        (1.0, 0.25, 1 - math.exp(-math.e * 0.25)),
        (0.1, 0.75, 1 - math.exp(-math.e * 0.75)),
        (1.0, 1.0, 1.0),  # d = 0
        (1.0, 0.0, 1.0),  # d = 1
        (-1.0, 0.25, 1.0),
        (0.0, 0.25, 1.0),
    ],
)
def test_the_kl_weight(advantage, pass_rate, weight):
    batch = batch_of(advantage=[advantage] * ROWS, pass_rate=[pass_rate] * ROWS)
    plain = penalties(build_objective("grpo", beta=1e-3), batch)
    torch.testing.assert_close(penalties(build_objective("apo"), batch), weight * plain)
    metrics = build_objective("apo").loss(batch)[1]
    assert metrics["weight/kl"].item() == pytest.approx(weight)
    torch.testing.assert_close(metrics["kl/ref"], build_objective("grpo", beta=1.0).loss(batch)[1]["kl/ref"])
    off = build_objective("apo", adaptive_kl=False)
    torch.testing.assert_close(penalties(off, batch), plain)


def test_the_penalty_scales_with_beta_and_enters_the_loss():
    batch = batch_of(1, advantage=[1.0, -1.0, 1.0, -1.0, 0.5, -0.5])  # of groups solved half, never, 3/4 of the time
    for beta in (1e-3, 0.5):
        loss, metrics = build_objective("apo", beta=beta, aggregation="token-mean").loss(batch)
        alone = build_objective("apo", beta=0.0, aggregation="token-mean").loss(batch)[0]
        log_ratio = torch.where(batch.mask, batch.new - batch.ref, 0.0)
        k3 = (-log_ratio).exp() + log_ratio - 1
        solved = batch.pass_rate[:, None]
        eased = (batch.advantage[:, None] > 0) & (solved > 0) & (solved < 1)
        expected = beta * (torch.where(eased, 1 - (-math.e * solved).exp(), 1.0) * k3)[batch.mask].mean()
        torch.testing.assert_close(loss - alone, expected)
        assert 0 < metrics["weight/kl"] < 1


@pytest.mark.parametrize("growth", [1.00001, 1.2, 1.0])
def test_wrong_answers_longer_than_the_right_ones_count_for_more(growth):
    lengths = [2.0, 4.5, math.inf, 1.0, 100.0, 0.0]
    batch = batch_of(2, advantage=[-1.0, -0.5, -1.0, 0.5, -1.0, -3.0], group_length=lengths)
    shaped = advantages(batch, growth)
    for row in range(ROWS):
        excess = batch.mask[row].sum().item() - lengths[row]
        advantage = batch.advantage[row].item()
        factor = 2 - growth ** -max(excess, 0.0) if advantage < 0 else 1.0
        assert 1.0 <= factor < 2.0
        expected = batch.mask[row].double() * factor * advantage
        torch.testing.assert_close(shaped[row], expected, rtol=1e-12, atol=0)
    assert batch.mask[0].sum() > 2 and batch.mask[5].sum() > 0  # some are longer


def test_the_length_is_that_of_sampled_tokens():
    """A hole of tool output in the middle does not count."""
    mask = torch.tensor([[1, 0, 0, 0, 0, 1, 1]]).expand(ROWS, 7)
    batch = replace(
        batch_of(3, advantage=[-1.0] * ROWS, group_length=[2.0] * ROWS),
        mask=mask, new=torch.zeros(6, 7).double(), old=torch.zeros(6, 7).double(), mu=torch.zeros(6, 7).double(),
    )  # fmt: skip
    shaped = advantages(batch, growth=2.0)
    assert shaped[0].tolist() == [-1.5, 0, 0, 0, 0, -1.5, -1.5]  # 3 tokens, 1 more than 2


def test_an_advantage_for_each_token_is_its_own():
    batch = batch_of(8, group_length=[1.0] * ROWS)
    signs = torch.where(torch.arange(7) % 2 == 0, 1.0, -1.0).double().expand(6, 7)
    mixed = replace(batch, advantage=torch.where(batch.mask, signs, torch.nan))
    objective = build_objective("apo", growth=1.5, beta=0.3)
    values, shaped = penalties(objective, mixed), advantages(mixed, growth=1.5)
    for sign, columns in ((1.0, slice(0, 7, 2)), (-1.0, slice(1, 7, 2))):
        alone = replace(batch, advantage=torch.full((6,), sign).double())
        torch.testing.assert_close(shaped[:, columns], advantages(alone, growth=1.5)[:, columns])
        torch.testing.assert_close(values[:, columns], penalties(objective, alone)[:, columns])
    factors = torch.where(signs < 0, 2 - 1.5 ** -(batch.mask.sum(dim=1, keepdim=True) - 1.0), 1.0)
    mean = factors[batch.mask].mean().item()
    assert objective.loss(mixed)[1]["weight/length"].item() == pytest.approx(mean)


def test_the_weights_are_reported():
    batch = batch_of(4, advantage=[-1.0, 1.0, -1.0, 1.0, 0.0, -1.0], group_length=[1.0] * ROWS)
    metrics = build_objective("apo", growth=1.5).loss(batch)[1]
    lengths = batch.mask.sum(dim=1).tolist()
    factors = [2 - 1.5 ** -(n - 1) if row in (0, 2, 5) else 1.0 for row, n in enumerate(lengths)]
    mean = sum(n * factor for n, factor in zip(lengths, factors, strict=True)) / sum(lengths)  # over tokens
    assert metrics["weight/length"].item() == pytest.approx(mean)


def test_without_its_two_changes_it_is_grpo():
    batch = batch_of(5)
    batch = replace(batch, new=batch.old + 4 * (batch.new - batch.old))  # some ratios beyond either bound
    assert ((batch.new - batch.old)[batch.mask].exp() - 1).abs().max() > 0.5
    plain = build_objective("apo", adaptive_kl=False, growth=1.0, beta=0.1)
    torch.testing.assert_close(gradient(plain, batch), gradient(build_objective("grpo", beta=0.1), batch))


def test_what_holds_for_every_objective():
    options = {"growth": 1.3, "beta": 0.3}
    batch = with_needs(properties.filled_batch(6, padding=True), 6)
    objective = build_objective("apo", **options)
    properties.check_on_policy(build_objective("apo", growth=1.3, beta=0.0), batch, advantages(batch, growth=1.3))
    batch = replace(batch, hidden=None)
    properties.check_masked_tokens(objective, batch)
    properties.check_order(objective, batch)
    properties.check_equal_rewards(build_objective("apo", beta=0.0), batch)
    properties.check_splits(lambda: build_objective("apo", **options), batch, [2, 2], [1, 4])


def test_padding_rows_may_hold_anything():
    batch = with_needs(properties.filled_batch(7, padding=True), 7)
    row = properties.NO_TOKEN
    poisoned = {name: getattr(batch, name).clone() for name in ("pass_rate", "group_length", "advantage")}
    for value in poisoned.values():
        value[row] = torch.nan
    objective = build_objective("apo")
    loss, slopes, metrics = properties.step(objective, replace(batch, **poisoned))
    expected, expected_slopes, _ = properties.step(objective, batch)
    assert torch.equal(loss, expected) and torch.equal(slopes, expected_slopes)
    assert all(value.isfinite() for value in metrics.values())


def test_extremes_stay_finite_in_float32():
    old = torch.tensor([[-900.0, -0.001, -50.0]] * 3)
    new = torch.tensor([[-0.001, -900.0, -50.0]] * 3)
    batch = TokenBatch(
        new, old, old, torch.ones(3, 3), torch.tensor([1.0, -1.0, 0.0]), torch.zeros(3).long(), ref=old,
        pass_rate=torch.tensor([0.3, 0.3, 0.3]), group_length=torch.tensor([1e-6, 1e-6, torch.inf]),
    )  # fmt: skip
    for growth in (1.00001, 1e30):
        loss, slopes, metrics = properties.step(build_objective("apo", growth=growth), batch)
        assert loss.isfinite() and slopes.isfinite().all() and all(value.isfinite() for value in metrics.values())


def test_the_configuration_and_its_values():
    properties.check_configuration("apo")
    objective = build_objective("apo")
    assert (objective.beta, objective.clip_low, objective.clip_high, objective.growth) == (1e-3, 0.2, 0.2, 1.00001)
    assert objective.adaptive_kl and objective.needs == {"ref", "pass_rate", "group_length"}
    assert build_objective("apo", beta=0.0).needs == {"group_length"}
    assert build_objective("apo", adaptive_kl=False).needs == {"ref", "group_length"}
    with pytest.raises(ValueError, match="needs group_length, pass_rate"):
        objective.loss(random_batch(0), Totals(1, 1, 1))
