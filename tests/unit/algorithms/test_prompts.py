"""The running mean of a prompt's accuracy, and what a sampler of prompts has to say for itself."""

import pytest

from rltk.algorithms.prompts import PromptSampler


@pytest.mark.parametrize("accuracy", [0.0, 0.25, 1.0])
@pytest.mark.parametrize("mean", [0.0, 0.5, 0.8])
def test_nine_tenths_of_the_mean_are_kept(mean, accuracy):
    assert PromptSampler().update(mean, accuracy) == pytest.approx(0.9 * mean + 0.1 * accuracy)
    assert PromptSampler(decay=0.5).update(mean, accuracy) == pytest.approx((mean + accuracy) / 2)


def test_a_prompt_never_sampled_counts_as_solved_half_of_the_time():
    assert PromptSampler().start == 0.5


def test_a_sampler_without_weights_says_so():
    with pytest.raises(NotImplementedError, match="write weights"):
        PromptSampler().weights([0.5])
