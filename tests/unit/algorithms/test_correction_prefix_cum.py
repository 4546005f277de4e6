"""The cumulative weight of the prefix: inclusive, capped, exact before the cap."""

import math
from dataclasses import replace

import pytest
import torch

from rltk.algorithms import build_correction, build_objective
from tests.unit.algorithms.correction_properties import check_correction
from tests.unit.algorithms.tables import Table, make_batch, random_batch


@pytest.mark.parametrize("cap", [2.0, 1.1, 50.0])
def test_against_a_token_by_token_oracle(cap):
    batch = random_batch(0, ratio=0.4)
    weight, kept = build_correction("prefix_cum", cap=cap)(batch)
    beyond = 0
    for row in range(6):
        total = 0.0
        for t in range(7):
            if batch.mask[row, t]:
                total += (batch.old - batch.mu)[row, t].item()
                beyond += math.exp(total) > cap
                assert weight[row, t].item() == pytest.approx(min(math.exp(total), cap)) and kept[row, t]
    assert (beyond > 0) == (cap < 50)


def test_its_mean_under_the_sampler_is_one_at_every_position():
    """Below the cap it is the exact importance weight of the prefix; the token's own is included."""
    policy = Table(0, vocabulary=3, steps=3)
    sampler = policy.near(1, 0.3)
    sequences = policy.sequences()
    old, mu = policy.logprobs(sequences), sampler.logprobs(sequences)
    batch = make_batch(old, old, torch.ones(len(old)).double(), mu=mu)
    weight, _ = build_correction("prefix_cum", cap=1e6)(batch)
    torch.testing.assert_close((mu.sum(1).exp()[:, None] * weight).sum(0), torch.ones(3).double())
    torch.testing.assert_close(weight[:, -1], (old - mu).sum(1).exp())


def test_tool_tokens_are_transparent_to_the_sum():
    old = torch.zeros(1, 5).double()
    mu = torch.tensor([[-0.1, -9.0, -0.2, -9.0, -0.3]]).double()
    mask = torch.tensor([[1, 0, 1, 0, 1]])
    weight, _ = build_correction("prefix_cum")(make_batch(old, old, torch.ones(1).double(), mu=mu, mask=mask))
    torch.testing.assert_close(weight[0, [0, 2, 4]], torch.tensor([0.1, 0.3, 0.6]).double().exp())


def test_it_reports_what_it_truncated():
    old = torch.zeros(2, 3).double()
    mu = torch.tensor([[-0.5, -0.5, 0.9], [0.1, 0.1, 0.1]]).double()  # e^.5, e^1 > 2, e^.1
    metrics = build_objective("grpo", correction=build_correction("prefix_cum")).loss(
        make_batch(old, old, torch.ones(2).double(), mu=mu)
    )[1]
    assert metrics["correction/tokens"].item() == pytest.approx(1 / 6)
    assert metrics["correction/sequences"].item() == pytest.approx(1 / 2)
    assert metrics["correction/weight_max"].item() == 2.0


def test_one_token_is_tis():
    batch = random_batch(1, ratio=0.5)
    single = replace(batch, mask=torch.arange(7).expand(6, 7) == 2)
    both = [
        build_objective("grpo", correction=build_correction(name)).loss(single)[0] for name in ("tis", "prefix_cum")
    ]
    torch.testing.assert_close(*both)


def test_what_holds_for_every_correction():
    check_correction("prefix_cum", ratio=0.4)


def test_a_weight_at_the_cap_is_not_truncated():
    old = torch.zeros(1, 2).double()
    batch = make_batch(old, old, torch.ones(1).double())
    objective = build_objective("grpo", correction=build_correction("prefix_cum", cap=1.0))
    assert objective.loss(batch)[1]["correction/tokens"] == 0


def test_defaults_and_ranges():
    assert build_correction("prefix_cum").cap == 2.0
    with pytest.raises(ValueError, match="cap=0.5 .*a number >= 1"):
        build_correction("prefix_cum", cap=0.5)
