"""What a batch refuses, and the counts of a step."""

from dataclasses import replace

import pytest
import torch

from rltk.algorithms import TokenBatch, Totals, build_objective
from tests.unit.algorithms.tables import random_batch


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        ("old", torch.zeros(6, 6, dtype=torch.float64), "old is .*shape"),
        ("mu", torch.zeros(6, 7), "mu is torch.float32"),
        ("new", torch.zeros(6, 7, dtype=torch.bfloat16), "new is torch.bfloat16"),
        ("new", torch.zeros(6, dtype=torch.float64), "new is .*\\[6\\]"),
        ("mask", torch.ones(6, 8), "mask is .*\\[6, 8\\]"),
        ("mask", torch.full((6, 7), 0.5), "mask holds values other than 0 and 1"),
        ("advantage", torch.zeros(7, dtype=torch.float64), "advantage is .*\\[7\\]"),
        ("advantage", torch.zeros(6, 6, dtype=torch.float64), "advantage is .*\\[6, 6\\]"),
        ("group", torch.zeros(6), "group is torch.float32"),
        ("entropy", torch.zeros(6, 1, dtype=torch.float64), "entropy is .*\\[6, 1\\]"),
        ("pass_rate", torch.zeros(5, dtype=torch.float64), "pass_rate is .*\\[5\\]"),
        ("hidden", torch.zeros(6, 8, 2, dtype=torch.float64), "hidden is .*\\[6, 8, 2\\]"),
        ("old", torch.zeros(6, 7, dtype=torch.float64, requires_grad=True), "old carries gradient"),
    ],
)
def test_a_field_that_does_not_fit_is_named(name, value, words):
    with pytest.raises(ValueError, match=words):
        replace(random_batch(0), **{name: value})


def test_an_advantage_is_one_for_each_sequence_or_one_for_each_token():
    batch = random_batch(0)
    table = batch.advantage[:, None].expand(6, 7)
    assert replace(batch, advantage=table).advantage.shape == (6, 7) and batch.advantage.shape == (6,)


@pytest.mark.parametrize("dtype", [torch.float32, torch.int64, torch.uint8])
def test_any_mask_of_zeros_and_ones_becomes_bool(dtype):
    batch = random_batch(0)
    again = replace(batch, mask=batch.mask.to(dtype))
    assert again.mask.dtype == torch.bool and torch.equal(again.mask, batch.mask)


def test_select_takes_rows_of_every_field():
    batch = random_batch(1)
    part = batch.select(torch.tensor([4, 1]))
    assert part.new.shape == (2, 7) and part.entropy is None
    assert torch.equal(part.advantage, batch.advantage[[4, 1]]) and torch.equal(part.mask, batch.mask[[4, 1]])
    assert batch.select(slice(0, 0)).new.shape == (0, 7)


def test_the_lengths_count_sampled_tokens():
    batch = random_batch(1)
    assert batch.masked_lengths.tolist() == batch.mask.sum(dim=1).tolist() and not batch.mask.all()
    assert batch.select(slice(2, 4)).masked_lengths.tolist() == batch.masked_lengths[2:4].tolist()


def test_moving_keeps_values():
    batch = random_batch(1)
    assert isinstance(batch.to("cpu"), TokenBatch) and torch.equal(batch.to("cpu").advantage, batch.advantage)


def test_totals_count_masked_tokens_and_no_empty_row():
    mask = torch.tensor([[1, 1, 0], [0, 0, 0], [0, 1, 0]])
    assert Totals.of(mask) == Totals(tokens=3, sequences=2, max_length=2)
    assert Totals.of(mask, max_length=512).max_length == 512
    assert Totals.of(mask[:2]) + Totals.of(mask[2:]) == Totals.of(mask)
    assert Totals.of(mask[:0]) == Totals(0, 0, 0)


def test_a_step_without_a_token_is_refused_but_an_empty_micro_batch_is_not():
    batch, objective = random_batch(0), build_objective("grpo")
    empty = replace(batch, new=batch.new.clone().requires_grad_(), mask=torch.zeros_like(batch.mask))
    with pytest.raises(ValueError, match="no token to learn from"):
        objective.loss(empty)
    loss, metrics = objective.loss(empty, Totals(10, 2, 5))
    loss.backward()  # the learner runs backward on it, so that every rank runs equally many
    assert loss == 0 and torch.equal(empty.new.grad, torch.zeros_like(empty.new)) and metrics["clip/share"] == 0


def test_a_field_in_needs_that_is_missing_is_named():
    objective = build_objective("grpo", beta=0.1)
    with pytest.raises(ValueError, match="needs ref"):
        objective.loss(replace(random_batch(0), ref=None))
