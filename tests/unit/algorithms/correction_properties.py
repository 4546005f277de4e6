"""What holds for every correction; each test file asks it of its own, by name and options."""

from __future__ import annotations

from dataclasses import replace

import torch

from rltk.algorithms import build_correction, build_objective
from tests.unit.algorithms import properties
from tests.unit.algorithms.tables import make_batch, random_batch


def check_correction(name: str, ratio: float = 0.3, **options) -> None:
    """All of them; `ratio`: how far old and mu lie apart, such that the correction has something to do."""

    def objective(aggregation: str = "token-mean"):
        return build_objective("grpo", aggregation=aggregation, correction=build_correction(name, **options))

    for seed in range(3):
        batch = properties.filled_batch(seed, rows=8, ratio=ratio, padding=True)
        _, kept = build_correction(name, **options)(batch)
        assert kept[batch.mask].any(), "a batch of which nothing is left tests nothing"
        properties.check_masked_tokens(objective(), batch)
        properties.check_order(objective(), batch)
        for aggregation in ("token-mean", "seq-mean-token-mean"):
            properties.check_splits(lambda how=aggregation: objective(how), batch, [3, 3], [1, 4, 5])
    _check_no_op(name, options)
    _check_detached(name, options)
    _check_extremes(name, options)


def _check_no_op(name: str, options: dict) -> None:
    """Where the sampler is the learner: weight 1, everything kept, nothing touched, the loss as without it."""
    batch = random_batch(3)
    batch = replace(batch, mu=batch.old)
    correction = build_correction(name, **options)
    weight, kept = correction(batch)
    assert torch.equal(weight[batch.mask], torch.ones(int(batch.mask.sum())).double()) and kept[batch.mask].all()
    corrected, plain = build_objective("grpo", correction=correction), build_objective("grpo")
    loss, slopes, metrics = properties.step(corrected, batch)
    expected, expected_slopes, _ = properties.step(plain, batch)
    assert torch.equal(loss, expected) and torch.equal(slopes, expected_slopes)
    assert metrics["correction/tokens"] == 0 and metrics["correction/sequences"] == 0


def _check_detached(name: str, options: dict) -> None:
    """Neither weight nor kept carries gradient, and `new` does not enter them."""
    batch = random_batch(4)
    weight, kept = build_correction(name, **options)(replace(batch, new=batch.new.clone().requires_grad_()))
    other, _ = build_correction(name, **options)(replace(batch, new=batch.new + 1.0))
    assert not weight.requires_grad and kept.dtype == torch.bool and torch.equal(weight, other)
    assert weight.shape == kept.shape == batch.mask.shape


def _check_extremes(name: str, options: dict) -> None:
    """float32, ratios far beyond every bound both ways, thousands of tokens of one drift, a row of padding."""
    old = torch.full((4, 2000), -30.0)
    mu = old + torch.tensor([[0.5], [-0.5], [-25.0], [25.0]])
    mask = torch.ones(4, 2000)
    for dead_row in (None, slice(3, 4), slice(0, 4)):
        if dead_row is not None:
            mask[dead_row] = 0
        batch = make_batch(old, old, torch.tensor([1.0, -1.0, 1.0, -1.0]), mu=mu, mask=mask)
        objective = build_objective("grpo", correction=build_correction(name, **options))
        new = old.clone().requires_grad_()
        totals = properties.Totals(8000, 4, 2000)
        loss, metrics = objective.loss(replace(objective.prepare(batch), new=new), totals)
        loss.backward()
        assert new.grad is not None and new.grad.isfinite().all() and loss.isfinite()
        assert all(value.isfinite() for key, value in metrics.items() if not key.endswith("_max"))
