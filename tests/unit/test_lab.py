"""The lab's loop: staleness as architecture counts it, runs that do not disturb each other, the gradient's noise."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

import rltk
from rltk.config import Task as TaskConfig
from rltk.errors import ConfigError
from rltk.files import without_nan
from rltk.lab.__main__ import _dials, main
from rltk.lab.arm import Arm, Settings
from rltk.lab.loop import Lab, _figures
from rltk.rollout.kv.options import KVOptions
from rltk.tasks import build_task

TINY = str(Path(rltk.__file__).parent / "models" / "tiny")


def lab(*arms, response=12, **changed):
    base = {"prompts": 2, "samples": 4, "minibatches": 2, "problems": 1, "eval_samples": 1, "lr": 1e-3, "steps": 2}
    torch.set_num_threads(1)
    return Lab(build_task(TaskConfig()), arms, Settings(TINY, **(base | changed)), 40, response)


def arm(name="a", **other):
    return Arm(name, **({"algorithm": "grpo", "reference": "mu"} | other))


def test_an_arm_samples_from_weights_as_old_as_its_staleness():
    made = lab(arm(), arm(staleness=1), arm(staleness=2), arm(staleness=9))
    name = "model.norm.weight"
    for version in range(4):
        with torch.no_grad():
            made.weights[name].fill_(version)
        made.remember()
        found = made._stale()[name][:, 0].tolist()
        assert found == [version, max(0, version - 1), max(0, version - 2), 0]
    assert made.weights[name][0, 0] == 3  # the learner's own are untouched


def test_a_stale_sampler_is_off_policy_and_a_fresh_one_is_not():
    made = lab(arm(), arm(staleness=2), minibatches=1)
    for _ in range(3):
        rows = made.train_step()
    fresh, stale = (row["log_ratio/square"] for row in rows)
    assert fresh < 1e-9 < 1e-5 < stale


def test_the_mismatch_of_a_compressed_cache_is_told_and_a_full_one_has_none():
    full = lab(arm(reference="old")).train_step()[0]
    rows = lab(arm(reference="old"), arm(), response=48, kv=KVOptions("longflow", 41.0)).train_step()
    assert full["mismatch/max"] < 1e-4 and full["mismatch/unsupported"] == 0
    assert full["mismatch/tail_p05/1-100"] == pytest.approx(1, abs=1e-4)
    for row in rows:  # with reference=mu of the first minibatch's sequences alone
        assert row["mismatch/max"] > 1e-3 and row["mismatch/tail_per_1k"] >= 0
    assert rows[0]["mismatch/max"] >= rows[1]["mismatch/max"] - 1e-6


def test_a_run_is_the_same_alone_and_beside_others():
    alone = lab(arm(seed=5, algorithm="ctpo"))
    beside = lab(arm(seed=1), arm(seed=5, algorithm="ctpo"), arm(seed=2, staleness=1))
    for _ in range(2):
        one, others = alone.train_step()[0], beside.train_step()
    assert others[1]["loss"] == pytest.approx(one["loss"], abs=1e-6)
    for name, value in alone.weights.items():
        assert torch.allclose(value[0], beside.weights[name][1], atol=1e-6)
    assert not torch.allclose(beside.weights["model.norm.weight"][0], beside.weights["model.norm.weight"][1])


def test_measuring_noise_changes_nothing_but_the_figures():
    plain, measured = lab(arm()), lab(arm(), noise_every=1)
    rows = [made.train_step()[0] for made in (plain, measured)]
    assert "gradient/noise" in rows[1] and "gradient/noise" not in rows[0]
    assert 0 < rows[1]["gradient/noise"] < 100
    for name, value in plain.weights.items():
        assert torch.allclose(value, measured.weights[name], atol=2e-6)


def test_a_gradient_that_is_not_finite_stops_its_run_and_no_other():
    made = lab(arm(), arm(seed=1))
    made.remember()
    batches = [made.roll().ragged(run, 4) for run in range(2)]
    for batch in batches:
        batch.reward[:] = np.arange(8) % 2  # so that there is an advantage
    name = "model.layers.0.mlp.up_proj.weight"
    before = made.weights[name].detach().clone()
    with torch.no_grad():
        made.weights["model.norm.weight"][0].fill_(torch.nan)
    made.learner.train(batches, [0, 0])
    assert made.learner.broken[0] is not None and made.learner.broken[1] is None
    assert torch.equal(made.weights[name][0], before[0]) and not torch.equal(made.weights[name][1], before[1])
    assert torch.isfinite(made.weights[name]).all()


def test_rows_and_dials():
    made = lab(arm(), steps=1)
    rows = list(made.run())
    assert [row[0]["step"] for row in rows] == [0, 1]
    assert 0 <= rows[1][0]["accuracy"] <= 1 and rows[0][0]["kl/start"] == pytest.approx(0, abs=1e-5)
    assert _dials(["seeds=[0,1]", "staleness=4"]).seeds == [0, 1] and _dials([]).seeds == []
    for wrong in (["stalenes=1"], ["seeds=x"], ["kv_bits=1"], ["staleness=-1"], ["threads=one"]):
        with pytest.raises(ConfigError):
            _dials(wrong)


@pytest.mark.parametrize(
    ("argument", "words"),
    [
        ("learner.schedule=cosine", "the lab knows only 'constant'"),
        ("rollout.dtype=bfloat16", "rollout.dtype"),
        ("reward=json:loads", "reward.path"),
        ("rollout.top_p=0.9", "refused in training"),
        ("algorithm.minibatches=5", "do not divide"),
    ],
)
def test_what_the_lab_cannot_do_is_refused_by_name(argument, words):
    with pytest.raises(ConfigError, match=words):
        main([argument, "steps=1"])


def test_a_group_that_is_not_admitted_teaches_nothing_and_is_still_counted():
    made = lab(arm(algorithm="dapo", reference="old"), arm(reference="old"))
    made.remember()
    rolled = made.roll()
    equal = [[replace(r, value=0.0, correct=False) for r in rewards] for rewards in rolled.rewards]
    rolled = replace(rolled, rewards=equal)
    left, kept = (rolled.ragged(run, 4, objective) for run, objective in enumerate(made.learner.objectives))
    assert np.isnan(left.reward).all() and (kept.reward == 0).all()
    before = {name: value.detach().clone() for name, value in made.weights.items()}
    rows = made.learner.train([left, kept], [0, 0])
    assert rows[0] == {} and rows[1]["loss"] == 0
    assert all(torch.equal(value[0], before[name][0]) for name, value in made.weights.items())
    assert _figures(rolled, 0)["reward"] == 0


def test_figures_that_are_not_numbers_are_written_as_none():
    assert without_nan({"a": [1.0, math.nan, {"b": math.inf}], "c": "nan"}) == {
        "a": [1.0, None, {"b": None}],
        "c": "nan",
    }
