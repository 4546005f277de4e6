"""The ledger's one equation, and its order."""

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rltk.errors import MismatchError
from rltk.ledger import Issue, Ledger


def balanced(ledger: Ledger, issued: int) -> bool:
    ledger.check()
    return ledger.issued == issued


@settings(max_examples=50)
@given(st.lists(st.sampled_from(["score", "train", "drop", "retry"]), max_size=60), st.integers(1, 5))
def test_issued_is_in_flight_scored_trained_and_dropped_at_any_instant(actions, prompts):
    ledger = Ledger(seed=1, size=None)
    issued = len(ledger.issue(prompts, 3))
    for number, action in enumerate(actions):
        flying, scored = list(ledger.in_flight), list(ledger.scored)
        if action == "score" and flying:
            ledger.score(flying[number % len(flying)])
        elif action == "train" and scored:
            ledger.train(scored[number % len(scored)])
        elif action == "drop" and flying + scored:
            ledger.drop((flying + scored)[number % len(flying + scored)], "test", 10)
        elif action == "retry" and flying:
            ledger.retry(flying[number % len(flying)])
            issued += 1
        assert balanced(ledger, issued)


def test_a_lost_sample_is_noticed():
    ledger = Ledger(seed=0)
    ledger.issue(1, 2)
    ledger.in_flight.popitem()
    with pytest.raises(MismatchError, match="2 samples were issued, 1 are accounted for"):
        ledger.check()


def test_nothing_ends_twice():
    ledger = Ledger(seed=0)
    uid = ledger.issue(1, 1)[0].uid
    with pytest.raises(MismatchError, match=uid):
        ledger.train(uid)  # not scored yet
    ledger.score(uid)
    ledger.train(uid)
    with pytest.raises(MismatchError, match="ended twice"):
        ledger.drop(uid, "again")


@given(st.integers(1, 300), st.integers(0, 5))
def test_every_epoch_visits_every_problem_once(size, seed):
    ledger = Ledger(seed=seed, size=size)
    for epoch in range(2):
        issues = ledger.issue(size, 1)
        assert sorted(issue.index for issue in issues) == list(range(size))
        assert {issue.epoch for issue in issues} == {epoch}


def test_epochs_and_seeds_differ_in_order():
    orders = {tuple(i.index for i in Ledger(seed=s, size=50).issue(50, 1)) for s in range(3)}
    ledger = Ledger(seed=0, size=50)
    orders |= {tuple(i.index for i in ledger.issue(50, 1)) for _ in range(2)}
    assert len(orders) == 4  # seed 0's first epoch is there twice


def test_a_restored_ledger_goes_on_where_it_was():
    whole, cut = Ledger(seed=3, size=20), Ledger(seed=3, size=20)
    for ledger in (whole, cut):
        for issue in ledger.issue(4, 2):
            ledger.score(issue.uid)
            ledger.train(issue.uid)
    again = Ledger.restore(json.loads(json.dumps(cut.state())))
    assert [i.uid for i in again.issue(4, 2)] == [i.uid for i in whole.issue(4, 2)]
    assert again.issued == whole.issued


def test_an_open_step_is_not_committed():
    ledger = Ledger(seed=0)
    ledger.issue(1, 2)
    with pytest.raises(MismatchError, match="still open"):
        ledger.state()


def test_a_retry_samples_the_same_tokens_and_seeds_differ_otherwise():
    issue = Issue(7, 0, 2)
    assert Issue(7, 0, 2, attempt=1).seed(5) == issue.seed(5)
    others = [
        Issue(8, 0, 2).seed(5),
        Issue(7, 1, 2).seed(5),
        Issue(7, 0, 3).seed(5),
        issue.seed(6),
        issue.seed(5, turn=1),
    ]
    assert len({issue.seed(5), *others}) == 6
