"""The five aggregations against their definitions, and their independence of ranks and micro-batches."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rltk.algorithms import Totals, build_correction, build_objective
from rltk.algorithms.aggregation import AGGREGATIONS, divisor
from tests.unit.algorithms.tables import gradient, random_batch


def test_definitions():
    values = torch.tensor([[1.0, 2.0, 4.0], [8.0, 0.0, 0.0], [0.0, 0.0, 0.0]])
    counted = torch.tensor([[True, True, True], [True, False, False], [False, False, False]])
    totals = Totals.of(counted, max_length=10)
    expected = {
        "token-mean": 15 / 4,
        "seq-mean-token-mean": (7 / 3 + 8) / 2,
        "seq-mean-token-sum": 15 / 2,
        "seq-mean-token-sum-norm": 15 / 20,
        "token-sum": 15.0,
    }
    assert set(expected) == set(AGGREGATIONS)
    for how, value in expected.items():
        loss = (values / divisor(counted.sum(dim=1), totals, how)).sum()
        assert loss.item() == pytest.approx(value), how


@given(
    seed=st.integers(0, 10_000),
    name=st.sampled_from(["grpo", "ctpo"]),
    how=st.sampled_from(AGGREGATIONS),
    ranks=st.sampled_from([1, 2, 4]),
    cuts=st.lists(st.integers(0, 12), max_size=5),
)
@settings(max_examples=60, deadline=None)
def test_any_split_over_ranks_and_micro_batches_sums_to_the_whole(seed, name, how, ranks, cuts):
    batch = random_batch(seed, rows=12)
    batch = replace(batch, mask=batch.mask & (torch.arange(12)[:, None] != seed % 12))  # one row is padding
    objective = build_objective(name, aggregation=how, beta=0.2, correction=build_correction("tis", cap=1.05))
    totals = Totals.of(batch.mask, max_length=9)
    loss, metrics = objective.loss(batch, totals)
    whole = gradient(objective, batch, totals)

    edges = sorted({0, 12, *cuts, *range(0, 12, 12 // ranks)})
    parts = [batch.select(slice(a, b)) for a, b in zip(edges, edges[1:], strict=False)]
    shares = [objective.loss(part, totals) for part in parts]
    torch.testing.assert_close(sum(share for share, _ in shares), loss, rtol=0, atol=1e-6)
    torch.testing.assert_close(
        torch.cat([gradient(objective, part, totals) for part in parts]), whole, rtol=0, atol=1e-6
    )
    for key, value in metrics.items():
        of_parts = torch.stack([share[key] for _, share in shares])
        merged = of_parts.max() if key.endswith("_max") else of_parts.sum()
        torch.testing.assert_close(merged, value, rtol=0, atol=1e-9, msg=key)


@pytest.mark.parametrize("how", AGGREGATIONS)
def test_without_totals_the_batch_is_all_there_is(how):
    batch, objective = random_batch(3), build_objective("grpo", aggregation=how)
    torch.testing.assert_close(objective.loss(batch)[0], objective.loss(batch, Totals.of(batch.mask))[0])


def test_metrics_are_means_over_masked_tokens():
    batch = random_batch(4)
    _, metrics = build_objective("grpo").loss(batch)
    log_ratio = (batch.new - batch.old)[batch.mask]
    torch.testing.assert_close(metrics["log_ratio/mean"], log_ratio.mean())
    torch.testing.assert_close(metrics["log_ratio/square"], (log_ratio**2).mean())
