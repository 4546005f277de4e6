"""The judge's errors as the lab gets them, and what the report calls the switching point."""

from __future__ import annotations

import json

import numpy as np
import pytest

from bench.fapo import judge_errors, lab_arms
from bench.fapo_report import alarms, report, smoothed, summary, switch
from rltk.lab.data import with_label_errors
from rltk.trajectory import RewardRecord

SOUND, FLAWED = RewardRecord(1.0, correct=True, flawed=False), RewardRecord(1.0, correct=True, flawed=True)
WRONG = RewardRecord(0.0, correct=False)


def test_labels_err_at_the_rates_that_were_asked_for_and_nothing_else_changes():
    rewards = [SOUND, FLAWED, WRONG] * 4000
    found = with_label_errors(rewards, miss=0.3, alarm=0.1, seed=5)
    assert np.mean([not r.flawed for r in found[1::3]]) == pytest.approx(0.3, abs=0.03)
    assert np.mean([bool(r.flawed) for r in found[0::3]]) == pytest.approx(0.1, abs=0.02)
    assert all(r is WRONG for r in found[2::3])
    assert all(r.value == 1.0 and r.correct for r in found[0::3])
    assert with_label_errors(rewards, 0.3, 0.1, 5) == found != with_label_errors(rewards, 0.3, 0.1, 6)
    assert with_label_errors(rewards, 0.0, 0.0, 5) == rewards


def test_a_judges_error_rates_come_back_from_its_precision_and_recall():
    """40 flawed, 60 sound; 30 of the flawed are caught, 6 of the sound are called flawed."""
    row = {"genrm/recall": 30 / 40, "genrm/precision": 30 / 36, "genrm/rule_flawed": 0.4}
    miss, alarm = judge_errors({"runs": {"fapo-s0": {"judge": [row]}}})
    assert (miss, alarm) == (pytest.approx(0.25), pytest.approx(0.1))
    assert [arm.label_miss for arm in lab_arms(0, miss, alarm)] == [0.0, 0.0, miss]


def test_false_alarms_in_training_are_of_the_sound_answers_of_all_steps():
    """Of 100: 50 right, 20 of those flawed, 24 called so, 15 rightly; 80 right and sound, 8 called flawed; 90, none."""
    train = {"accuracy": [0.5, 0.8, 0.9], "genrm/flawed": [0.48, 0.1, None], "genrm/precision": [15 / 24, 0.0, None],
             "genrm/rule_flawed": [0.4, 0.0, None]}  # fmt: skip
    assert alarms(train) == pytest.approx((9 + 8) / (30 + 80 + 90))
    assert alarms({}) is None


def run(values, accuracy=0.9, flawed=0.1):
    curve = [{"step": s, "avg@4": accuracy, "accuracy": accuracy, "greedy": accuracy, "flawed": flawed} for s in (0, 9)]
    judged = {"step": 0, "genrm/precision": 1.0, "genrm/recall": 0.5, "genrm/f1": 2 / 3}
    train = {f"advantage/{kind}": values for kind in ("sound", "flawed", "wrong", "flawed_positive")}
    return {"curve": curve, "judge": [judged, judged], "train": train}


def test_the_switching_point_is_after_the_last_step_at_which_flawed_answers_gain():
    assert smoothed([1.0, None, 3.0]) == [(1, 1.0), (3, 2.0)]
    assert switch(run([1.0] * 5 + [0.0] * 6)) == 10  # the mean of the last five is 0 from there on
    assert switch(run([1.0] * 8)) is None
    assert switch(run([0.0, 0.0])) == 1


def test_the_report_compares_means_over_seeds(tmp_path):
    values = [0.5, -0.5]
    runs = {"fapo-s0": run(values, 0.9, 0.02), "fapo-s1": run(values, 0.8, 0.04), "grpo-s0": run(values, 0.9, 0.12)}
    found = summary(runs, "avg@4")
    assert found["fapo_accuracy_over_grpo"] == pytest.approx(-0.05) and found["fapo_flawed_over_grpo"] == pytest.approx(
        0.25
    )
    file = tmp_path / "fapo.json"
    file.write_text(json.dumps({"road": {"command": "c", "hardware": "h", "runs": runs}}))
    report(file)
    written = json.loads(file.read_text())
    assert written["figures"]["judge_f1_before"] == pytest.approx(2 / 3, abs=1e-4) and "road" in written
    assert (tmp_path / "fapo.png").stat().st_size > 1000 and "| grpo-s0 |" in (tmp_path / "fapo.md").read_text()
