"""Token discipline is enforced where trajectories are made."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rltk.errors import MismatchError
from rltk.trajectory import Segment, Trajectory

PROMPT = Segment("prompt", np.asarray([1, 2, 3]))


def model(ids, logprobs=None, version=(0, 1), reason="stop"):
    return Segment("model", np.asarray(ids), -np.ones(len(ids)) if logprobs is None else logprobs, version, reason)


def test_a_missing_log_prob_is_refused_not_filled():
    with pytest.raises(MismatchError, match="sampler's log-probs"):
        Segment("model", np.asarray([4, 5]), None, (0, 1))
    with pytest.raises(MismatchError, match="token 1 is nan"):
        model([4, 5], np.asarray([-1.0, np.nan]))


def test_lengths_must_agree():
    with pytest.raises(MismatchError, match="2 sampled ids"):
        model([4, 5], np.asarray([-1.0]))


def test_a_positive_log_prob_is_no_log_prob():
    with pytest.raises(MismatchError, match="above 0"):
        model([4], np.asarray([0.5]))


@pytest.mark.parametrize("kind", ["prompt", "tool", "control", "boundary"])
def test_only_sampled_tokens_carry_log_probs(kind):
    with pytest.raises(MismatchError, match="only model segments"):
        Segment(kind, np.asarray([1]), np.asarray([-1.0]))


def test_an_unknown_kind_and_a_missing_prompt_are_refused():
    with pytest.raises(MismatchError, match="not one of"):
        Segment("thought", np.asarray([1]))  # type: ignore[arg-type]
    with pytest.raises(MismatchError, match="prompt segment"):
        Trajectory("u", "p", "g", (model([4]),))


@given(st.lists(st.tuples(st.sampled_from(["model", "tool", "control"]), st.integers(0, 5)), max_size=6))
def test_mask_ids_and_log_probs_stay_aligned(parts):
    segments = [PROMPT]
    for number, (kind, size) in enumerate(parts):
        ids = np.full(size, 10 + number)
        segments.append(model(ids, -np.full(size, number + 1.0)) if kind == "model" else Segment(kind, ids))
    trajectory = Trajectory("u", "p", "g", tuple(segments))
    assert len(trajectory.ids) == len(trajectory.mask)
    assert trajectory.mask.sum() == len(trajectory.logprobs) == trajectory.length
    # the log-prob of a sampled token names the segment that it came from, and so does its id
    assert (trajectory.ids[trajectory.mask] - 9 == -trajectory.logprobs).all()


def test_staleness_is_counted_from_the_oldest_segment():
    trajectory = Trajectory(
        "u", "p", "g", (PROMPT, model([4], version=(0, 7)), model([5], version=(0, 3), reason="length"))
    )
    assert trajectory.version == (0, 3)
    assert trajectory.truncated
