"""Where the mismatch comes from, and when somebody is told of it."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rltk.causes import MismatchAlarm, by_cause
from rltk.config import Config
from rltk.metrics import mismatch
from rltk.rollout.kv.options import KVOptions
from rltk.trajectory import Segment, Trajectory

FULL, LONGFLOW = KVOptions(), KVOptions("longflow", 0.2)


def sampled(length: int, version: tuple[int, int], logprob: float = -1.0) -> Trajectory:
    model = Segment("model", np.arange(length), np.full(length, logprob), version, "stop")
    return Trajectory("t", "p", "g", (Segment("prompt", np.arange(3)), model))


def test_with_a_full_cache_and_current_weights_all_of_it_is_precision():
    parts = by_cause([sampled(4, (0, 3))], [np.full(4, -1.25)], (0, 3), FULL, probe_mean=9.0)
    assert parts == {"mismatch/mean/precision": 0.25, "mismatch/mean/cache": 0.0, "mismatch/mean/staleness": 0.0}


def test_what_a_compressed_cache_adds_is_what_the_probe_does_not_see():
    for kv in (LONGFLOW, KVOptions("fp8")):
        parts = by_cause([sampled(4, (0, 3))], [np.full(4, -1.25)], (0, 3), kv, probe_mean=0.0625)
        assert parts == {
            "mismatch/mean/precision": 0.0625, "mismatch/mean/cache": 0.1875, "mismatch/mean/staleness": 0.0
        }  # fmt: skip


def test_older_weights_are_told_from_the_cache():
    trajectories, old = [sampled(2, (0, 3)), sampled(6, (0, 1))], [np.full(2, -1.25), np.full(6, -1.75)]
    parts = by_cause(trajectories, old, (0, 3), LONGFLOW, probe_mean=0.0625)
    assert parts["mismatch/mean/cache"] == 0.1875
    assert parts["mismatch/mean/staleness"] == pytest.approx((2 * 0.25 + 6 * 0.75) / 8 - 0.25)


def test_nothing_is_told_apart_where_no_token_is_of_the_current_weights():
    assert by_cause([sampled(4, (0, 2))], [np.full(4, -1.25)], (0, 3), LONGFLOW, 0.0) == {}
    assert by_cause([sampled(4, (0, 3))], [None], (0, 3), LONGFLOW, 0.0) == {}
    assert by_cause([sampled(4, (0, 3))], [], (0, 3), LONGFLOW, 0.0) == {}


@settings(max_examples=50)
@given(st.lists(st.tuples(st.integers(1, 30), st.integers(0, 1), st.floats(-9, 0, width=32)), min_size=1, max_size=8))
def test_the_parts_sum_to_the_mean_mismatch(rows):
    trajectories = [sampled(length, (0, version)) for length, version, _ in rows]
    old = [np.full(length, value) for length, _, value in rows]
    whole = mismatch([t.logprobs - o for t, o in zip(trajectories, old, strict=True)])["mismatch/mean"]
    parts = by_cause(trajectories, old, (0, 1), LONGFLOW, probe_mean=0.01)
    assert not parts or sum(parts.values()) == pytest.approx(whole, abs=1e-9)


# The alarm


def off_by(factor: float, tokens: int) -> dict[str, float]:
    """Metrics of a response whose every tenth token is off by `factor`."""
    gaps = np.zeros(tokens)
    gaps[::10] = np.log(factor)
    return mismatch([gaps])


def test_the_alarm_rings_when_one_token_in_twenty_is_off_by_more_than_two():
    assert off_by(1.9, 400)["mismatch/alarm"] == 0
    assert off_by(2.1, 400)["mismatch/alarm"] == 1
    assert off_by(0.4, 2400)["mismatch/alarm"] == 3  # each thousand of positions
    assert off_by(100.0, 90)["mismatch/alarm"] == 0  # too few to tell


def test_it_speaks_once_until_the_mismatch_has_gone():
    alarm = MismatchAlarm(replace(Config(), kv=LONGFLOW))
    good, bad = off_by(1.1, 1200), off_by(4.0, 1200)
    said = [alarm.hear(row) for row in (good, bad, bad, good, bad)]
    assert [line is not None for line in said] == [False, True, False, False, True]
    assert said[1] is not None and "is 0.25 at positions 1-1000, under 0.5" in said[1]
    assert alarm.hear({}) is None


def test_it_names_the_fix_of_its_cause():
    bad = off_by(4.0, 200)

    def line(**keys) -> str:
        return MismatchAlarm(replace(Config(), **keys)).hear(bad) or ""

    assert "raise kv.budget, or correct for it: ratio.reference=mu" in line(kv=LONGFLOW)
    assert line(kv=LONGFLOW, correction="sparse").endswith("raise kv.budget.")
    assert "rollout.dtype" in line() and "kv.budget" not in line()
