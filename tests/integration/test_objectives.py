"""Every objective and every correction takes two steps of the real stack, and logs what is its own."""

from __future__ import annotations

import math

import pytest
from safetensors.torch import load_file

from rltk.algorithms import Correction, Objective
from rltk.algorithms.registry import available
from tests.integration.places import TINY
from tests.integration.test_road import SMALL, allow, rows, run

pytestmark = allow(1)

# A metric that this method alone, or few others, would log.
OWN = {
    "apo": "weight/kl", "cispo": "weight/mean", "ctpo": "log_rho/sd", "dapo": "clip/high", "delta": "weight/sd",
    "dgpo": "hellinger/mean", "dhpo": "clip/sequence_share", "dr_grpo": "clip/share", "fapo": "clip/high",
    "fg_expo": "kl/beta",
    "grpo": "clip/share", "gspo": "log_s/mean", "minirl": "weight/mean", "minpro": "log_prefix/mean",
    "reinforce_pp": "clip/share", "rloo": "clip/share", "sapo": "gate/slope",
}  # fmt: skip
QUICK = ("minpro", "dgpo")  # ctpo and grpo: test_road.py; fapo: test_everything.py


def two_steps(tmp_path, *settings: str) -> list[dict]:
    code, out = run(*SMALL, "steps=2", "evaluation.greedy=false", f"output={tmp_path}", "name=run", *settings)
    assert code == 0, out
    found = rows(tmp_path / "run")
    assert [row["step"] for row in found] == [1, 2]
    assert all(math.isfinite(row[name]) for row in found for name in ("loss", "grad_norm"))
    before, after = load_file(TINY / "model.safetensors"), load_file(tmp_path / "run" / "model" / "model.safetensors")
    assert max((after[name].float() - before[name].float()).abs().max().item() for name in after) > 1e-6
    return found


@pytest.mark.parametrize("name", QUICK)
def test_an_objective_trains(tmp_path, name):
    assert OWN[name] in two_steps(tmp_path, f"algorithm={name}")[-1]


def test_the_table_is_complete():
    assert set(OWN) == set(available("rltk.algorithms", Objective))


@pytest.mark.full
@pytest.mark.parametrize("name", sorted(set(OWN) - set(QUICK)))
def test_every_objective_trains(tmp_path, name):
    assert OWN[name] in two_steps(tmp_path, f"algorithm={name}")[-1]


@pytest.mark.full
@pytest.mark.parametrize("name", sorted(set(available("rltk.algorithms.corrections", Correction)) - {"none"}))
def test_every_correction_trains(tmp_path, name):
    assert "correction/tokens" in two_steps(tmp_path, "algorithm=grpo", f"correction={name}")[-1]


@pytest.mark.full
def test_the_ratio_against_the_sampler_trains(tmp_path):
    assert "window/scale" in two_steps(tmp_path, "algorithm=ctpo", "ratio.reference=mu")[-1]
