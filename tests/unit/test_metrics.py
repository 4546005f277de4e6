import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from rltk.errors import MismatchError
from rltk.metrics import LearnedArrays, mismatch, ratio_quantiles, step_metrics
from rltk.trajectory import RewardRecord, Segment, Trajectory


def trajectory(group, length, reward=None, finish="stop", logprob=-1.0, uid="t"):
    segments = (
        Segment("prompt", np.arange(3)),
        Segment("model", np.arange(length), np.full(length, logprob), (0, 0), finish),
    )
    return Trajectory(uid, "p", group, segments, "", reward)


def right(flawed=None, value=1.0):
    return RewardRecord(value, correct=True, flawed=flawed)


WRONG = RewardRecord(0.0, correct=False)
TIMEOUT = RewardRecord(None, reason="timeout after 10 s", detail={"cause": "timeout"})


def test_rewards_groups_and_verdicts():
    batch = [
        trajectory("a", 4, right(flawed=True)),
        trajectory("a", 4, WRONG),
        trajectory("b", 4, right(flawed=False)),
        trajectory("b", 4, right()),
        trajectory("c", 4, WRONG),
        trajectory("c", 4, TIMEOUT),  # leaves c one valid sample: not a group to compare
    ]
    metrics = step_metrics(batch, levels=["1", "1", "2", "2", "3", "3"])
    assert metrics["reward/mean"] == pytest.approx(3 / 5)
    assert metrics["reward/std"] == pytest.approx(math.sqrt(0.24))
    assert metrics["reward/constant_groups"] == 0.5
    assert metrics["accuracy"] == pytest.approx(3 / 5)
    assert (metrics["accuracy/1"], metrics["accuracy/2"], metrics["accuracy/3"]) == (0.5, 1.0, 0.0)
    assert metrics["flawed"] == 0.5
    assert metrics["masked/share"] == pytest.approx(1 / 6)
    assert metrics["masked/timeout"] == pytest.approx(1 / 6)
    assert metrics["masked/count"] == 1


def test_lengths_and_masked_by_length():
    batch = [
        trajectory("a", n, TIMEOUT if n > 6 else WRONG, "length" if n == 8 else "stop")
        for n in (8, 1, 7, 2, 3, 4, 5, 6)
    ]
    metrics = step_metrics(batch)
    assert (metrics["length/mean"], metrics["length/max"], metrics["truncated"]) == (4.5, 8, 1 / 8)
    assert [metrics[f"masked/length_q{i}"] for i in (1, 2, 3, 4)] == [0, 0, 0, 1]


def test_metrics_without_data_are_absent():
    assert step_metrics([]) == {}
    metrics = step_metrics([trajectory("a", 2, TIMEOUT), trajectory("a", 2)])
    assert not any(
        name.startswith(("reward/", "accuracy", "flawed", "ratio/", "mismatch/", "entropy")) for name in metrics
    )
    assert (metrics["masked/timeout"], metrics["masked/not_scored"]) == (0.5, 0.5)


def test_ratio_quantiles_by_position():
    rows = [np.r_[np.full(16, 0.1), np.full(48, 0.2), np.full(4, 0.3)], np.r_[np.full(16, -0.1), 0.0]]
    quantiles = ratio_quantiles(rows)
    assert quantiles["ratio/q50/1-16"] == pytest.approx(0.0)
    assert quantiles["ratio/q95/1-16"] == pytest.approx(0.1)
    assert quantiles["ratio/q05/17-64"] == pytest.approx(0.2)  # one zero among 49 values is below the 5th percentile
    assert quantiles["ratio/q50/65-256"] == pytest.approx(0.3)
    assert len(quantiles) == 9


def test_mismatch_estimates_the_kl_of_a_known_pair():
    """Two distributions over four tokens: the samples' frequencies are exact, so that k1 and k3 both equal the KL."""
    mu, old = np.array([0.4, 0.3, 0.2, 0.1]), np.array([0.25, 0.25, 0.25, 0.25])
    tokens = np.repeat(np.arange(4), (mu * 1000).astype(int))
    result = mismatch([np.log(mu / old)[tokens]])
    expected = float(np.sum(mu * np.log(mu / old)))
    assert result["mismatch/kl_k1"] == pytest.approx(expected, abs=1e-12)
    assert result["mismatch/kl"] == pytest.approx(expected, abs=1e-12)
    assert result["mismatch/max"] == pytest.approx(math.log(2.5))
    assert result["mismatch/tail_per_1k"] == pytest.approx(100)  # only the last token's ratio, 2.5, is beyond 2
    assert result["mismatch/kl_p05"] == pytest.approx(math.log(0.1 / 0.25))
    assert result["mismatch/tail_p05/1-1000"] == pytest.approx(0.4)


def test_tail_is_kept_apart_by_position():
    late = np.r_[np.zeros(1000), np.full(500, 0.5)]
    result = mismatch([late, np.zeros(10)])
    assert result["mismatch/tail_p05/1-1000"] == pytest.approx(1.0)
    assert result["mismatch/tail_p05/1001-2000"] == pytest.approx(math.exp(-0.5))


def test_sampler_and_learner_are_compared_in_the_right_direction():
    batch = [trajectory("a", 2, WRONG, logprob=-1.0), trajectory("a", 3, TIMEOUT)]
    learned = LearnedArrays(
        old=[np.full(2, -1.5), None], new=[np.full(2, -1.2), None], entropy=[np.full(2, 0.25), None]
    )
    metrics = step_metrics(batch, learned)
    assert metrics["mismatch/kl_k1"] == pytest.approx(0.5)
    assert metrics["ratio/q50/1-16"] == pytest.approx(0.3)
    assert metrics["entropy"] == pytest.approx(0.25)


@settings(max_examples=50)
@given(st.lists(arrays(np.float32, st.integers(0, 40), elements=st.floats(-1e6, 1e6, width=32)), max_size=5))
def test_mismatch_is_finite_and_kl_not_negative(rows):
    result = mismatch(rows)
    assert all(math.isfinite(value) for value in result.values())
    assert result.get("mismatch/kl", 0.0) >= -1e-9


def test_values_that_are_not_finite_are_counted_and_left_out():
    old = np.array([-1.0, np.nan, -np.inf, -2.0], np.float32)
    metrics = step_metrics([trajectory("a", 4, WRONG)], LearnedArrays(old=[old], new=[old]))
    assert metrics["not_finite/old"] == 0.5
    assert metrics["mismatch/max"] == 1.0
    assert all(math.isfinite(value) for value in metrics.values())


def test_arrays_that_do_not_line_up_are_refused():
    batch = [trajectory("a", 4, WRONG, uid="issue-7")]
    with pytest.raises(MismatchError, match=r"learned.old of trajectory issue-7 has shape \(3,\); it sampled 4 tokens"):
        step_metrics(batch, LearnedArrays(old=[np.zeros(3)]))
    with pytest.raises(MismatchError, match="learned.new has 2 arrays for 1 trajectories"):
        step_metrics(batch, LearnedArrays(new=[np.zeros(4), np.zeros(4)]))
    with pytest.raises(MismatchError, match="2 levels for 1"):
        step_metrics(batch, levels=["1", "2"])
