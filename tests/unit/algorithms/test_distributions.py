"""Figures of whole distributions against float64 and against what is known of them."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from rltk.algorithms.distributions import MEASURES, entropy, forward_kl, hellinger, measure


def pair(seed, apart, rows=8, vocabulary=500, scale=4.0):
    """Log-probs of two policies at a distance, float64 [rows, vocabulary]."""
    generator = torch.Generator().manual_seed(seed)
    logits = scale * torch.randn(rows, vocabulary, generator=generator, dtype=torch.float64)
    other = logits + apart * torch.randn(rows, vocabulary, generator=generator, dtype=torch.float64)
    return logits.log_softmax(-1), other.log_softmax(-1)


@pytest.mark.parametrize("apart", [1e-3, 0.1, 3.0])
def test_float32_has_the_digits_of_float64_near_and_far(apart):
    new, ref = pair(0, apart)
    p, q = new.exp(), ref.exp()
    exact = {
        "entropy": -(p * new).sum(-1),
        "hellinger": 1 - ((new + ref) / 2).exp().sum(-1),
        "forward_kl": (q * (ref - new)).sum(-1),
    }
    found = measure(MEASURES, new.float().log_softmax(-1), ref.float().log_softmax(-1))
    assert set(found) == set(exact)
    # At a distance of 1e-7 one minus a float32 sum would have no correct digit.
    assert apart > 1e-3 or exact["hellinger"].max() < 1e-6
    for name, value in exact.items():
        assert found[name].dtype == torch.float32 and found[name].shape == (8,)
        slack = 3e-8 if name == "forward_kl" else 0.0
        torch.testing.assert_close(found[name].double(), value, rtol=0.02, atol=slack, msg=lambda m, n=name: n + m)


@given(st.integers(0, 10_000), st.floats(0.0, 8.0))
def test_bounds_and_symmetry(seed, apart):
    new, ref = (x.float() for x in pair(seed, apart, rows=3, vocabulary=20))
    distance, divergence = hellinger(new, ref), forward_kl(new, ref)
    assert (distance >= 0).all() and (distance <= 1 + 1e-6).all()
    assert torch.equal(distance, hellinger(ref, new))
    assert (divergence >= 2 * distance - 1e-5).all()  # KL >= -2 log(1 - H2) >= 2 H2
    assert (entropy(new) >= 0).all() and (entropy(new) <= math.log(20) + 1e-5).all()


def test_equal_policies_are_at_no_distance_and_disjoint_ones_at_the_largest():
    same = pair(1, 0.0)[0].float()
    assert hellinger(same, same).eq(0).all() and forward_kl(same, same).abs().max() < 1e-6
    one, other = torch.tensor([[0.0, -math.inf]]), torch.tensor([[-math.inf, 0.0]])
    assert hellinger(one, other).item() == 1.0 and forward_kl(one, other).item() == math.inf
    assert entropy(one).item() == 0.0
    assert entropy(torch.tensor([[1e-7, -40.0]])).item() == 0.0  # a log-prob rounded past 0
    half = torch.tensor([[0.5, 0.5]]).log()
    assert forward_kl(half, one).item() == pytest.approx(math.log(2))  # of ref, which is sure, against new
    assert hellinger(half, one).item() == pytest.approx(1 - math.sqrt(0.5))


def test_gradients_are_right_in_float64():
    logits, ref = torch.randn(3, 6, dtype=torch.float64, requires_grad=True), pair(2, 1.0, 3, 6)[1]
    for name in MEASURES:
        assert torch.autograd.gradcheck(lambda x, n=name: measure([n], x.log_softmax(-1), ref)[n], (logits,))


def test_what_cannot_be_measured_is_refused():
    new = pair(3, 1.0)[0]
    with pytest.raises(ValueError, match="unknown measures hellingr; known: entropy, hellinger"):
        measure(["hellingr"], new)
    with pytest.raises(ValueError, match="hellinger compares with a reference"):
        measure(["entropy", "hellinger"], new)
    with pytest.raises(ValueError, match="bfloat16"):
        measure(["entropy"], new.bfloat16())
    assert measure([], new) == {}
