"""A step's batch: refills, what the ledger makes of them, and the step's row."""

from __future__ import annotations

import random
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rltk.algorithms import Objective
from rltk.config import Batch
from rltk.errors import MismatchError
from rltk.gathering import Gathered, gather
from rltk.learner.settings import TrainResult
from rltk.ledger import Ledger
from rltk.prompting import Prompting
from rltk.rollout.kv.options import KVOptions
from rltk.rollout.worker import Job, RolloutResult
from rltk.step_row import step_row
from rltk.sync.probe import ProbeResult
from rltk.sync.shared_memory import Published
from rltk.trajectory import ToolUse
from tests.unit.samples import Numbers, sampled

TIMES = {"time/step": 2.0, "time/generate": 1.0, "time/train": 0.5, "time/logprobs": 0.5}


class Varied(Objective):
    """Admits groups whose rewards differ; notes what it was asked about."""

    asked: list

    def admit(self, group):
        self.asked.append([sample.reward.value for sample in group])
        return len(set(self.asked[-1])) > 1


def varied() -> Varied:
    objective = Varied()
    objective.asked = []
    return objective


class Rollouts:
    """Rolls out what `ledger` has in flight: random rewards, some missing, some samples broken, some issued again."""

    def __init__(self, ledger: Ledger, seed: int, broken=0.0, unscored=0.0, died=0.0) -> None:
        self.ledger, self.random = ledger, random.Random(seed)
        self.broken, self.unscored, self.died = broken, unscored, died
        self.calls = 0

    def __call__(self, records) -> RolloutResult:
        self.calls += 1
        self.ledger.check()
        if self.random.random() < self.died:
            for uid in list(self.ledger.in_flight):
                self.ledger.retry(uid)
        jobs = [Job(i.uid, i.group, records[i.group], 0) for i in self.ledger.in_flight.values()]
        failed = {job.uid: "torn" for job in jobs if self.random.random() < self.broken}
        values = [None if self.random.random() < self.unscored else float(self.random.random() < 0.3) for _ in jobs]
        found = [sampled(job, value) for job, value in zip(jobs, values, strict=True) if job.uid not in failed]
        return RolloutResult(found, failed, 0.1, 0.0)


shares = st.sampled_from([0.0, 0.3, 0.9])


@settings(max_examples=80, deadline=None)
@given(
    st.integers(1, 4), st.integers(1, 3), st.integers(0, 3), st.sampled_from([None, 2, 50]), st.integers(0, 99),
    shares, shares, shares,
)  # fmt: skip
def test_the_ledger_accounts_for_every_sample_whatever_is_refilled(
    prompts, samples, refills, size, seed, broken, unscored, died
):
    ledger, objective = Ledger(seed, size), varied()
    roll = Rollouts(ledger, seed, broken, unscored, died)
    batch = Batch(prompts, samples, refills)
    for _ in range(3):
        gathered = gather(batch, Numbers(size), ledger, Prompting(Numbers(size), None, seed), objective, roll)
        ledger.check()
        assert not ledger.in_flight
        assert list(ledger.scored) == [t.uid for t in gathered.admitted]
        assert gathered.refills <= refills
        admitted = {t.group_id for t in gathered.admitted}
        assert len(admitted) <= prompts and admitted.isdisjoint(t.group_id for t in gathered.refused)
        if gathered.refills < refills:  # it stopped because every prompt has its group, or a group nobody could use
            used = {t.group_id for t in gathered.refused}
            assert len(gathered.records) - len(used) == prompts
        for trajectory in gathered.admitted:
            ledger.train(trajectory.uid)
    assert all(group and None not in group for group in objective.asked)
    assert set(ledger.dropped) <= {"broken sample", "not admitted", "reissued"}
    ledger.state()  # nothing is open


def test_groups_that_are_not_admitted_are_replaced_until_the_batch_is_full():
    ledger, objective = Ledger(0), varied()
    roll = Rollouts(ledger, seed=1)
    gathered = gather(Batch(8, 3, 50), Numbers(None), ledger, Prompting(Numbers(None), None, 0), objective, roll)
    groups = Counter(t.group_id for t in gathered.admitted)
    assert list(groups.values()) == [3] * 8 and roll.calls == gathered.refills + 1 > 1
    assert ledger.dropped == {"not admitted": len(gathered.refused)} and ledger.dropped_by_length
    assert ledger.cursor == len(gathered.records) == 8 + len(gathered.refused) // 3
    assert gathered.refused_share == pytest.approx(1 - 8 / len(gathered.records))


def test_without_a_rule_one_round_is_all():
    ledger = Ledger(0)
    roll = Rollouts(ledger, seed=1, unscored=1.0)
    gathered = gather(Batch(4, 3), Numbers(None), ledger, Prompting(Numbers(None), None, 0), Objective(), roll)
    assert roll.calls == 1 and len(gathered.admitted) == 12 and gathered.refused_share == 0
    assert list(gathered.failures()) == ["12 samples without a reward, and left out, first: why"]


def test_a_sample_that_never_comes_back_is_an_error():
    ledger = Ledger(0)

    def lose_one(records) -> RolloutResult:
        result = Rollouts(ledger, seed=1)(records)
        return replace(result, trajectories=result.trajectories[1:])

    with pytest.raises(MismatchError, match="1 samples never came back"):
        gather(Batch(2, 2), Numbers(None), ledger, Prompting(Numbers(None), None, 0), Objective(), lose_one)


def test_shuffled_rewards_are_the_same_rewards():
    ledger = Ledger(0)
    roll = Rollouts(ledger, seed=1)
    gathered = gather(Batch(8, 8), Numbers(None), ledger, Prompting(Numbers(None), None, 0), Objective(), roll)
    before = list(gathered.admitted)
    gathered.permute_rewards(3)
    assert [t.uid for t in gathered.admitted] == [t.uid for t in before]
    rewards = [[t.reward.value for t in group if t.reward] for group in (before, gathered.admitted)]
    assert sorted(rewards[0]) == sorted(rewards[1]) and rewards[0] != rewards[1]


def test_the_row_is_of_all_that_was_sampled_and_the_learners_part_of_what_it_saw():
    record = Numbers(None).problem(4)
    right, wrong = (sampled(Job(f"g/{i}", "g", record, 0), float(i), bool(i)) for i in (1, 0))
    right = replace(right, calls=(ToolUse(0, "python", "timeout"),))
    refused = [sampled(Job(f"h/{i}", "h", record, 0), 1.0, True, tokens=4) for i in range(2)]
    gathered = Gathered([right, wrong], refused, {"x": "torn"}, {"g": record, "h": record}, refills=2)
    old = [np.full(2, -0.5, np.float32), np.full(2, -0.25, np.float32)]
    new = [values + 0.125 for values in old]
    metrics = {"log_ratio/mean": 0.5, "log_ratio/square": 0.5}
    learned = TrainResult(metrics, old, new, old, [0, 1], tokens=6, seconds={"deepspeed": 0.5})
    ledger = Ledger(0)
    ledger.dropped["not admitted"] = 2
    published = Published((1, 7), "", ProbeResult(2.0, 1.0), 0.0)
    row = step_row(gathered, learned, published, ledger, KVOptions(), busy=1.0, times=TIMES)
    assert row["accuracy"] == row["accuracy/1"] == 0.75 and row["reward/constant_groups"] == 0.5
    assert (row["refill/rounds"], row["refill/not_admitted"], row["dropped/not admitted"]) == (2.0, 0.5, 2.0)
    assert (row["weight_version"], row["failed"], row["probe/max"]) == (7.0, 1.0, 2.0)
    assert row["mismatch/max"] == 0.25 and row["log_ratio/sd"] == 0.5 and "log_ratio/square" not in row
    assert row["tokens_per_s/rollout"] == 12.0 and row["tokens_per_s/learner"] == 6.0 and row["overhead"] == 0.25
    assert row["ratio/q50/1-16"] == 0.125
    assert (row["tools/used"], row["tools/status/timeout"]) == (0.25, 1.0)
    against_mu = step_row(
        gathered, replace(learned, reference="mu"), published, ledger, KVOptions(), busy=1.0, times=TIMES
    )
    assert against_mu["ratio/q05/1-16"] == 0.125 and against_mu["ratio/q95/1-16"] == 0.375  # mu is -0.5 everywhere
