"""The lab and the real stack: the same trajectories give the same loss, the same metrics and the same weights."""

from __future__ import annotations

import numpy as np
import pytest
import ray
import torch

from rltk.config import Task as TaskConfig
from rltk.lab.arm import Arm, Settings
from rltk.lab.loop import Lab
from rltk.learner.group import LearnerGroup
from rltk.learner.settings import LearnerSettings
from rltk.rollout import weight_file
from rltk.seeds import minibatch_seed
from rltk.tasks import build_task
from tests.integration.places import TINY

# A large eps makes Adam's step proportional to the gradient, so that equal weights mean equal gradients.
COMMON = {"lr": 1e-3, "eps": 1e-2, "max_grad_norm": 0.5, "minibatches": 2}
ARMS = {
    "ctpo, tis": {"algorithm": "ctpo", "correction": "tis"},
    "ctpo against the sampler": {"algorithm": "ctpo", "reference": "mu"},
    "dgpo, prefix_cum": {"algorithm": "dgpo", "correction": "prefix_cum"},
    "delta": {"algorithm": "delta"},
}
FULL = {
    **{
        name: {"algorithm": name}
        for name in ("minpro", "fapo", "gspo", "cispo", "rloo", "reinforce_pp", "sapo", "dhpo", "dr_grpo", "fg_expo",
                     "apo", "minirl")
    },
    **{name: {"algorithm": "grpo", "correction": name}
       for name in ("icepop", "seq_mask", "geo_mask", "sparse", "prefix_min")},
}  # fmt: skip


def both(tmp_path, **arm):
    """One training step of the lab's second run, and of the learner, on the same samples of a quantised sampler."""
    settings = Settings(str(TINY), prompts=4, samples=4, problems=2, eval_samples=1, kv_bits=6, **COMMON)
    arms = [Arm(f"s{seed}", seed=seed, **arm) for seed in (3, 4)]
    lab = Lab(build_task(TaskConfig()), arms, settings, 64, 40)
    lab.remember()
    rolled = lab.roll()
    batches = [rolled.ragged(run, 4) for run in range(2)]
    seed = minibatch_seed(4, 1)
    found = lab.learner.train(batches, [minibatch_seed(3, 1), seed])[1]
    assert lab.learner.broken == [None, None]
    group = LearnerGroup(
        LearnerSettings(
            model=str(TINY), device="cpu", algorithm=arm["algorithm"], algorithm_options={},
            correction=arm.get("correction", "none"), correction_options={}, reference=arm.get("reference", "old"),
            temperature=1.0, max_response_tokens=40, seed=0, zero_stage=1, tokens_per_micro_batch=300, threads=1,
            **COMMON,
        ),
        1, cpus=0.5, gpus=0, deadline=120, start_deadline=180,
    )  # fmt: skip
    try:
        ray.get(group.start(), timeout=180)
        real = group.train(batches[1], seed).metrics
        group.publish(str(tmp_path / "w"), (0, 1))
    finally:
        for rank in group.ranks:
            ray.kill(rank)
    weights = {name: value[1].detach() for name, value in lab.weights.items()}
    return weights, found, weight_file.read(tmp_path / "w")[1], real


def check(tmp_path, **arm):
    weights, found, want, real = both(tmp_path, **arm)
    before = {name: value for name, value in torch_weights().items()}
    moved = max((want[name] - before[name]).abs().max().item() for name in want)
    apart = max((want[name] - weights[name]).abs().max().item() for name in want)
    assert set(want) == set(weights) and moved > 1e-5
    assert apart < 0.01 * moved and apart < 2e-6, f"lab and learner differ by {apart} of {moved} moved"
    shared = sorted(set(found) & set(real) - {"grad_norm"})
    assert {"loss", "log_ratio/square"} <= set(shared)
    for name in shared:
        assert found[name] == pytest.approx(real[name], rel=2e-3, abs=2e-5), name


def torch_weights():
    from safetensors.torch import load_file

    return {name: value.float() for name, value in load_file(TINY / "model.safetensors").items()}


@pytest.mark.parametrize("name", ARMS)
def test_lab_and_learner_take_the_same_step(ray_cluster, tmp_path, name):
    check(tmp_path, **ARMS[name])


@pytest.mark.full
@pytest.mark.parametrize("name", FULL)
def test_lab_and_learner_take_the_same_step_with_every_other_method(ray_cluster, tmp_path, name):
    check(tmp_path, **FULL[name])


def test_the_samplers_noise_is_in_the_ratio(tmp_path):
    """What the comparisons above rest on: mu and old differ, and no sample is without a group."""
    settings = Settings(str(TINY), prompts=2, samples=4, problems=2, eval_samples=1, kv_bits=6, **COMMON)
    lab = Lab(build_task(TaskConfig()), [Arm("a", "grpo", reference="mu")], settings, 64, 40)
    lab.remember()
    batch = lab.roll().ragged(0, 4)
    figures = lab.learner.train([batch], [1])[0]
    assert figures["log_ratio/square"] > 1e-6 and np.isfinite(batch.mu[batch.mask]).all()
    assert torch.isfinite(torch.tensor(list(figures.values()))).all()
