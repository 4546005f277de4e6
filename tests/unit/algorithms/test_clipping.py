"""The clipped surrogate by itself: the edges of its bounds, and advantages of 0 and near it."""

import pytest
import torch

from rltk.algorithms.clipping import clipped_loss

LOW, HIGH, DUAL = 0.5, 1.5, 2.0  # exact in binary, so that a ratio can lie on them
RATIO = torch.tensor([0.25, LOW, 1.0, HIGH, 1.75, DUAL, 2.5], dtype=torch.float64)


@pytest.mark.parametrize(
    ("advantage", "high", "low", "dual"),
    [
        (1.0, [0, 0, 0, 0, 1, 1, 1], [0] * 7, [0] * 7),
        (0.5, [0, 0, 0, 0, 1, 1, 1], [0] * 7, [0] * 7),
        (0.0, [0] * 7, [0] * 7, [0] * 7),
        (-0.5, [0] * 7, [1, 0, 0, 0, 0, 0, 0], [0, 0, 0, 0, 0, 0, 1]),
        (-1.0, [0] * 7, [1, 0, 0, 0, 0, 0, 0], [0, 0, 0, 0, 0, 0, 1]),
    ],
)
def test_a_ratio_on_a_bound_is_within_it_and_an_advantage_of_zero_is_never_clipped(advantage, high, low, dual):
    _, flags = clipped_loss(RATIO, torch.full_like(RATIO, advantage), LOW, HIGH, DUAL)
    found = {name.removeprefix("clip/"): flag.tolist() for name, flag in flags.items()}
    either = [max(three) for three in zip(high, low, dual, strict=True)]
    outside = [1, 0, 0, 0, 1, 1, 1]
    assert found == {"high": high, "low": low, "dual": dual, "share": either, "outside": outside}


@pytest.mark.parametrize("dual", [None, DUAL])
@pytest.mark.parametrize("advantage", [2.0, 0.5, 0.0, -0.5, -2.0])
def test_the_loss_by_its_definition(advantage, dual):
    loss, _ = clipped_loss(RATIO, torch.full_like(RATIO, advantage), LOW, HIGH, dual)
    for ratio, value in zip(RATIO.tolist(), loss.tolist(), strict=True):
        expected = max(-advantage * ratio, -advantage * min(max(ratio, LOW), HIGH))
        if dual is not None and advantage < 0:
            expected = min(expected, -advantage * dual)
        assert value == expected


def test_each_token_has_bounds_of_its_own():
    low, high, ratio = torch.tensor([[0.75, 0.25], [1.25, 3.0], [2.0, 2.0]])
    one = torch.ones(2)
    assert clipped_loss(ratio, one, low, high, None)[0].tolist() == [-1.25, -2.0]
    assert clipped_loss(ratio, -one, low, high, high)[0].tolist() == [1.25, 2.0]
