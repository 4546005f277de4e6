"""Prompts by weight: the weights are obeyed, nothing comes twice, and a resumed run chooses the same."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import dataclass

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rltk.algorithms.prompts import PromptSampler
from rltk.errors import RltkError
from rltk.ledger import Ledger
from rltk.prompting import CANDIDATES, Prompting, accuracy
from rltk.rollout.worker import Job
from rltk.trajectory import Record
from tests.unit.samples import Numbers, sampled

SEED = 5


@dataclass(frozen=True)
class Doubtful(PromptSampler):
    """Prompts that are right half the time weigh most, those always or never right nothing."""

    def weights(self, means):
        return [mean * (1 - mean) for mean in means]


def prompting(size: int | None, sampler: PromptSampler | None = Doubtful()) -> tuple[Prompting, Ledger]:  # noqa: B008
    return Prompting(Numbers(size), sampler, SEED), Ledger(SEED, size)


def observe(prompts: Prompting, index: int, right: int, of: int) -> None:
    record = prompts.task.problem(index)
    group = [sampled(Job(f"{index}/{i}", str(index), record, 0), float(i < right)) for i in range(of)]
    prompts.observe(index, record, group)


@pytest.mark.parametrize("size", [None, 10])
def test_without_a_sampler_the_tasks_order_is_kept_and_nothing_remembered(size):
    prompts, ledger = prompting(size, None)
    observe(prompts, 3, 1, 2)
    assert prompts.draw(ledger, 12) == Ledger(SEED, size).draw(12)
    assert prompts.state() == {"means": {}, "visits": {}}


@given(
    st.lists(st.sampled_from([n / 20 for n in range(21)]), min_size=2, max_size=12),
    st.integers(1, 12),
    st.integers(0, 99),
)
def test_a_choice_is_a_race_of_exponential_clocks(means, count, cursor):
    """Each prompt's clock rings after Exp(weight); the first to ring are chosen. It is the definition of drawing by
    weight without replacement, and the same uniform numbers must give the same choice."""
    prompts, ledger = prompting(len(means))
    prompts.means, ledger.cursor = dict(enumerate(means)), cursor
    weights = np.asarray([mean * (1 - mean) for mean in means])
    count = min(count, int((weights > 0).sum()))
    clocks = -np.log(np.random.default_rng([SEED, cursor]).random(len(means)))
    ring = np.divide(clocks, weights, out=np.full(len(means), np.inf), where=weights > 0)
    expected = np.argsort(ring, kind="stable")[:count]
    assert [index for index, _ in prompts.draw(ledger, count)] == [int(index) for index in expected]


@given(st.integers(1, 8), st.integers(1, 40))
def test_a_small_finite_task_is_gone_through_evenly_and_no_issue_comes_twice(size, count):
    prompts, ledger = prompting(size)
    drawn = prompts.draw(ledger, count)
    times = Counter(index for index, _ in drawn)
    assert set(times.values()) <= {count // size, count // size + 1} and sum(times.values()) == count
    assert len(set(drawn + prompts.draw(ledger, count))) == 2 * count  # another epoch each time


def test_prompts_of_weight_zero_wait_until_nothing_else_is_left():
    prompts, ledger = prompting(6)
    for index in (1, 4):
        prompts.means[index] = 1.0
    for _ in range(20):
        assert {index for index, _ in prompts.draw(ledger, 4)} == {0, 2, 3, 5}
    assert {index for index, _ in prompts.draw(ledger, 5)} > {0, 2, 3, 5}


def test_an_endless_task_is_chosen_from_in_its_order_by_level():
    prompts, ledger = prompting(None)
    candidates = Ledger(SEED, None).draw(CANDIDATES * 4)
    prompts.means["1"] = 0.0  # never right
    drawn = prompts.draw(ledger, 4)
    assert ledger.cursor == CANDIDATES * 4
    assert drawn == [problem for problem in candidates if problem in drawn] and len(set(drawn)) == 4
    assert all(index % 3 != 1 for index, _ in drawn)
    assert set(prompts.draw(ledger, 4)).isdisjoint(candidates)


@pytest.mark.parametrize("size", [None, 7])
def test_a_restored_state_goes_on_where_it_was(size):
    (whole, ledger), (cut, cut_ledger) = prompting(size), prompting(size)
    for prompts, book in ((whole, ledger), (cut, cut_ledger)):
        for index, _ in prompts.draw(book, 5):
            observe(prompts, index, index % 3, 3)
    again, again_ledger = prompting(size)
    again.restore(json.loads(json.dumps(cut.state())))
    again_ledger.cursor = cut_ledger.cursor
    assert again.state() == whole.state() != prompting(size)[0].state()
    for _ in range(3):
        drawn = whole.draw(ledger, 5)
        assert again.draw(again_ledger, 5) == drawn
        for index, _ in drawn:
            observe(whole, index, 1, 2)
            observe(again, index, 1, 2)


def test_means_follow_each_group_by_index_or_by_level():
    finite, _ = prompting(9)
    observe(finite, 4, 3, 4)
    observe(finite, 4, 0, 4)
    assert finite.means == {4: pytest.approx(0.9 * (0.9 * 0.5 + 0.1 * 0.75))}
    endless, _ = prompting(None)
    observe(endless, 4, 3, 4)
    observe(endless, 7, 0, 4)  # the same level
    assert endless.means == {"1": pytest.approx(0.9 * (0.9 * 0.5 + 0.1 * 0.75))}


def test_a_sample_is_right_by_its_label_else_by_its_reward_and_unscored_ones_do_not_count():
    job = Job("u", "g", Record("r", (), ""), 0)
    labelled = [sampled(job, -1.0, True), sampled(job, 1.0, False)]
    assert accuracy([*labelled, sampled(job, 0.5), sampled(job, 0.25), sampled(job, 0.0), sampled(job, None)]) == 3 / 5
    assert accuracy([sampled(job, None, True)]) is None
    prompts, _ = prompting(3)
    prompts.observe(0, job.record, [sampled(job, None)])
    assert prompts.means == {}


@pytest.mark.parametrize("given", [[1.0], [float("nan")] * 4, [1.0, 1.0, 1.0, -1.0]])
def test_weights_that_are_none_are_refused(given):
    class Odd(PromptSampler):
        def weights(self, means):
            return given

    prompts, ledger = prompting(4, Odd())
    with pytest.raises(RltkError, match=r"Odd\.weights gave .* for 4 accuracies"):
        prompts.draw(ledger, 2)
