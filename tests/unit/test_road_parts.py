"""Small parts of the road: weight files, checkpoints, the time ledger, the probe, the learning rate."""

import json
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from rltk.checkpoint import Checkpoints
from rltk.config import Config
from rltk.errors import WeightMismatchError
from rltk.learner.deepspeed_config import gradient_scale, learning_rate
from rltk.learner.group import RankDiedError
from rltk.learner.settings import learner_settings
from rltk.placement import place
from rltk.recovery import RECOVERIES, Recovery
from rltk.roles import Roles
from rltk.rollout import weight_file
from rltk.run_state import RunState
from rltk.sync.probe import TOLERANCE, compare
from rltk.tasks import build_task
from rltk.time_ledger import STAGES, TimeLedger


def test_weights_survive_the_file_bit_for_bit_and_the_checksum_is_of_what_is_read(tmp_path):
    tensors = {"a": torch.randn(3, 5), "b": torch.randn(7).bfloat16(), "c": torch.arange(4)}
    written = weight_file.write(tmp_path / "w", tensors.items(), (0, 3))
    checksum, found = weight_file.read(tmp_path / "w")
    assert checksum == written
    assert all(
        torch.equal(found[name], tensor) and found[name].dtype == tensor.dtype for name, tensor in tensors.items()
    )
    data = bytearray((tmp_path / "w").read_bytes())
    data[11] ^= 1
    (tmp_path / "w").write_bytes(data)
    assert weight_file.read(tmp_path / "w")[0] != written


def test_a_torn_weight_file_is_refused(tmp_path):
    weight_file.write(tmp_path / "w", [("a", torch.randn(100))], (0, 0))
    whole = (tmp_path / "w").read_bytes()
    (tmp_path / "w").write_bytes(whole[40:])
    with pytest.raises(WeightMismatchError, match="holds 360 bytes of data, its footer says 400"):
        weight_file.read(tmp_path / "w")


def test_checkpoints_are_whole_or_absent_and_the_last_ones_stay(tmp_path):
    checkpoints = Checkpoints(tmp_path, keep=2)

    def write(path):
        with open(path, "w") as file:
            file.write("weights")

    for step in (1, 2, 3):
        checkpoints.save(step, {"step": step}, write)
    assert checkpoints.steps() == [2, 3]

    def die(path):
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        checkpoints.save(4, {"step": 4}, die)
    assert checkpoints.steps() == [2, 3]
    state, learner_file = checkpoints.latest()
    assert state == {"step": 3} and Path(learner_file).read_text() == "weights"


def test_the_time_ledger_sums_to_the_wall_time():
    clock = TimeLedger()
    with clock.stage("train"):
        sum(range(10000))
    clock.add("logprobs", 0.25)
    clock.add("train", -0.25)
    row = clock.close()
    assert math.isclose(sum(row[f"time/{name}"] for name in (*STAGES, "other")), row["time/step"], abs_tol=1e-9)
    assert row["time/logprobs"] == 0.25
    assert clock.close()["time/train"] == 0.0


def test_the_probe_refuses_weights_that_compute_something_else():
    learner = [np.asarray([-1.0, -2.0]), np.asarray([-3.0])]
    close = [learner[0] + 1e-5, learner[1]]
    assert compare(close, learner, 1e-4, 1e-4, "engine 0").largest == pytest.approx(1e-5, rel=1e-3)
    with pytest.raises(WeightMismatchError, match=r"engine 0.*0\.9"):
        compare([learner[0], learner[1] + 0.9], learner, 1e-4, 1e-4, "engine 0")
    with pytest.raises(WeightMismatchError, match="nan"):
        compare([learner[0], np.asarray([np.nan])], learner, 1e-4, 1e-4, "engine 0")


@pytest.mark.parametrize(
    "gap, words",
    [
        (0.05, r"rollout\.dtype=float32.*sync\.probe_mean=0\.1 sync\.probe_max=0\.5"),
        (1.0, "does not run the learner's weights. Fix"),
    ],
)
def test_in_bfloat16_a_little_over_the_bound_may_be_the_models_own_rounding(gap, words):
    learner = [np.asarray([-1.0, -2.0])]
    with pytest.raises(WeightMismatchError, match=words):
        compare([learner[0] + gap], learner, *TOLERANCE["bfloat16"], "engine 0")


@given(st.sampled_from(["constant", "linear", "cosine"]), st.integers(0, 10), st.integers(1, 60))
def test_the_learning_rate_is_a_function_of_the_step(schedule, warmup, total):
    base = learner_settings(Config(), "cpu", 1)
    settings = replace(base, schedule=schedule, warmup_steps=warmup, total_steps=total + warmup, lr=1e-3)
    rates = [learning_rate(settings, step) for step in range(total + warmup + 1)]
    assert all(0 <= rate <= 1e-3 + 1e-12 for rate in rates)
    assert all(a <= b for a, b in zip(rates[:warmup], rates[1:warmup], strict=False))
    assert rates[warmup] == 1e-3 and all(a >= b for a, b in zip(rates[warmup:], rates[warmup + 1 :], strict=False))
    assert rates[-1] == (1e-3 if schedule == "constant" else pytest.approx(0.0, abs=1e-12))


def test_the_loss_is_scaled_against_deepspeeds_own_average():
    assert [gradient_scale(4, stage) for stage in range(4)] == [4.0] * 4
    assert gradient_scale(4, 3, sequence_parallel=2) == 8.0 and gradient_scale(4, 2, sequence_parallel=2) == 4.0


def test_settings_travel_as_plain_data():
    settings = learner_settings(Config(), "cpu", 1)
    assert json.loads(json.dumps(vars(settings)))["algorithm"] == "ctpo"


def test_a_run_goes_back_to_its_checkpoint_and_neither_versions_nor_time_do():
    task = build_task(Config().task)
    begun = RunState.fresh(Config(), task, None, incarnation=0, spent=0.0)
    begun.step, begun.version = 2, (0, 2)
    for issue in begun.ledger.issue(2, 2):
        begun.ledger.score(issue.uid)
        begun.ledger.train(issue.uid)
    saved = json.loads(json.dumps(begun.plain()))
    again = RunState.fresh(Config(), task, None, incarnation=3, spent=100.0)
    again.restore(saved)
    assert (again.step, again.version) == (2, (3, 2))
    assert again.ledger == begun.ledger and again.prompting.state() == begun.prompting.state()
    assert again.plain()["summary"]["wall_seconds"] >= 100.0 > saved["summary"]["wall_seconds"]


@pytest.mark.parametrize("dies_again", [False, True])
def test_the_learner_is_restarted_so_often_between_two_checkpoints_and_no_oftener(monkeypatch, dies_again):
    started, told = [], []

    def restart(*arguments) -> None:
        started.append(arguments)
        if dies_again:
            raise RankDiedError("learner rank 0 died during 'start'")

    monkeypatch.setattr("rltk.recovery.restart_learner", restart)
    recovery = Recovery(Config(), place(Config()), Roles(), lambda: None, told.append)
    error = RankDiedError("learner rank 1 died during 'train'")
    if dies_again:
        with pytest.raises(RankDiedError, match="rank 0 died during 'start'"):
            recovery.restart_learner(error)
        assert len(started) == RECOVERIES
        return
    for _ in range(RECOVERIES):
        recovery.restart_learner(error)
    recovery.checkpointed()
    for _ in range(RECOVERIES):
        recovery.restart_learner(error)
    with pytest.raises(RankDiedError, match="rank 1 died"):
        recovery.restart_learner(error)
    assert len(started) == len(told) == 2 * RECOVERIES and "rank 1 died" in told[0]
