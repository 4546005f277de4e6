import itertools
import json
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rltk.statistics import evaluate_summary, mean_interval, pass_at_k


@pytest.mark.parametrize("samples", [1, 4, 6])
def test_pass_at_k_is_the_share_of_subsets_with_a_right_one(samples):
    for right, k in itertools.product(range(samples + 1), range(1, samples + 1)):
        verdicts = [True] * right + [False] * (samples - right)
        subsets = list(itertools.combinations(verdicts, k))
        assert pass_at_k(samples, right, k) == pytest.approx(sum(map(any, subsets)) / len(subsets), abs=1e-12)


def test_pass_at_k_is_unbiased():
    p, n, k = 0.3, 6, 4
    mean = sum(math.comb(n, c) * p**c * (1 - p) ** (n - c) * pass_at_k(n, c, k) for c in range(n + 1))
    assert mean == pytest.approx(1 - (1 - p) ** k, abs=1e-12)


@pytest.mark.parametrize(("samples", "right", "k"), [(4, 5, 1), (4, -1, 1), (4, 2, 5), (4, 2, 0)])
def test_pass_at_k_refuses_what_makes_no_sense(samples, right, k):
    with pytest.raises(ValueError, match="needs 0 <= right"):
        pass_at_k(samples, right, k)


@pytest.mark.parametrize(
    ("right", "n", "low", "high"), [(5, 10, 0.23659, 0.76341), (0, 10, 0.0, 0.27753), (81, 263, 0.25529, 0.36621)]
)
def test_one_sample_a_problem_gives_the_plain_wilson_interval(right, n, low, high):
    mean, got_low, got_high = mean_interval([1.0] * right + [0.0] * (n - right))
    assert mean == pytest.approx(right / n)
    assert (got_low, got_high) == pytest.approx((low, high), abs=1e-5)


@given(st.lists(st.floats(0, 1), min_size=1, max_size=40), st.floats(1, 64))
def test_interval_holds_its_mean_and_stays_in_range(values, draws):
    mean, low, high = mean_interval(values, draws)
    assert 0 <= low <= mean + 1e-12 and mean <= high + 1e-12 and high <= 1
    assert high > low


@pytest.mark.parametrize(("a", "b"), [(1.0, 1.0), (0.4, 0.2), (8.0, 0.5), (1e6, 1e6)])
def test_interval_covers_the_truth_as_often_as_it_says(a, b):
    """Problems of difficulty Beta(a, b), 8 samples each; the last case has problems that are all alike."""
    random = np.random.default_rng(0)
    chances = random.beta(a, b, size=(1000, 128))
    means = random.binomial(8, chances) / 8
    covered = [low <= a / (a + b) <= high for _, low, high in (mean_interval(row, draws=8) for row in means)]
    assert 0.92 <= np.mean(covered) <= 0.99


def test_samples_of_one_problem_do_not_count_as_independent():
    alike = mean_interval([1.0] * 50 + [0.0] * 50, draws=8)
    apart = mean_interval([0.5] * 100, draws=8)
    assert apart[2] - apart[1] < 0.5 * (alike[2] - alike[1])


def test_summary_of_a_small_evaluation():
    correct = [[True, True, False, True], [False, False, False, False], [True, None, True, None], [None] * 4]
    flawed = [[True, False, None, False], [None] * 4, [None, None, True, None], [None] * 4]
    summary = evaluate_summary(correct, ["1", "2", "2", "2"], [True, False, True, None], flawed)
    assert (summary["problems"], summary["samples"], summary["masked"]) == (4, 4, 6 / 16)
    assert summary["avg@4"] == pytest.approx((0.75 + 0 + 1) / 3)
    assert summary["pass@1"] == pytest.approx(summary["avg@4"])
    assert summary["pass@2"] == pytest.approx((1 + 0 + 1) / 3)  # C(1, 2) = 0: no pair without a right one
    assert summary["pass@4"] == pytest.approx(1 / 2)  # only two problems have four verdicts
    assert summary["greedy"] == pytest.approx(2 / 3)
    assert summary["flawed"] == pytest.approx(2 / 4)  # the second right answer of problem 2 was masked
    assert summary["levels"]["1"]["avg@4"] == 0.75 and summary["levels"]["1"]["problems"] == 1
    assert summary["levels"]["2"]["greedy"] == 0.5
    assert summary["avg@4_ci"][0] < summary["avg@4"] < summary["avg@4_ci"][1]
    assert json.loads(json.dumps(summary)) == summary


def test_what_has_no_data_is_absent():
    assert set(evaluate_summary([[None, None]])) == {"problems", "samples", "masked"}
    assert "greedy" not in evaluate_summary([[True]], greedy=[None])
    assert evaluate_summary([]) == {"problems": 0, "samples": 0}


def test_lists_that_do_not_line_up_are_refused():
    with pytest.raises(ValueError, match="levels has 1 entries for 2 problems"):
        evaluate_summary([[True], [False]], levels=["1"])
