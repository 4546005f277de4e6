"""The plan's arithmetic, its text, and that a dry run costs nothing heavy."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rltk.checks import check
from rltk.compose import load
from rltk.config import Config
from rltk.learner.packing import balance, micro_batches
from rltk.model_folder import resolve_model
from rltk.plan import make_plan
from rltk.plan_view import WIDTH, render


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Config:
    config = resolve_model(load(["cluster.device=cpu"]))
    return replace(config, output=str(tmp_path_factory.mktemp("runs")))


def test_the_default_batch_from_prompts_to_optimizer_steps(base):
    batch = make_plan(base).batch
    assert (batch.prompts, batch.samples, batch.sequences) == (32, 8, 256)
    assert (batch.minibatches, batch.sequences_per_minibatch, batch.sequences_per_rank) == (4, 64, 64)
    assert (batch.tokens_per_sequence, batch.tokens_per_rank) == (48 + 64, 64 * 112)
    assert batch.micro_batches == 1  # 8192 tokens hold 73 sequences of 112
    assert (batch.optimizer_steps, batch.response_tokens) == (60 * 4, 60 * 256 * 64)


def test_ranks_and_small_budgets_make_more_micro_batches(base):
    learner = replace(base.learner, ranks=3, tokens_per_micro_batch=500)
    batch = make_plan(replace(base, learner=learner)).batch
    assert batch.sequences_per_rank == 22  # 64 / 3, rounded up
    assert batch.micro_batches == 6  # 500 tokens hold 4 sequences of 112
    tiny = make_plan(replace(base, learner=replace(learner, tokens_per_micro_batch=10))).batch
    assert tiny.micro_batches == 22  # one sequence each


@given(st.lists(st.integers(2, 112), min_size=64, max_size=64), st.integers(50, 2000))
def test_no_batch_needs_more_micro_batches_than_planned(base, lengths, budget):
    """The learner's own packing, over any lengths the task may produce."""
    plan = make_plan(replace(base, learner=replace(base.learner, tokens_per_micro_batch=budget))).batch
    sizes = np.asarray(lengths)
    (positions,) = balance(sizes, ranks=1)
    assert len(micro_batches(sizes, positions, budget)) <= plan.micro_batches
    assert sizes.sum() <= plan.tokens_per_rank


@pytest.mark.parametrize(("steps", "every", "times"), [(60, 20, 4), (60, 0, 2), (61, 20, 5), (1, 1, 2), (3, 1, 4)])
def test_evaluations_are_counted_before_within_and_after(base, steps, every, times):
    plan = make_plan(replace(base, steps=steps, evaluation=replace(base.evaluation, every=every)))
    assert plan.evaluation.times == times
    assert plan.evaluation.sequences == 128 * (4 + 1)


def test_roles_carry_counts_and_shares(base):
    plan = make_plan(replace(base, rollout=replace(base.rollout, engines=2), learner=replace(base.learner, ranks=3)))
    assert {role.name: role.actors for role in plan.roles} == {
        "rollout engine": 2,
        "rollout worker": 1,
        "reward worker": 1,
        "learner rank": 3,
    }
    assert sum(role.actors * role.cpus for role in plan.roles) <= plan.placement.cores
    assert all(role.gpus == 0 for role in plan.roles)


@pytest.mark.parametrize(("stage", "per_parameter"), [(0, 16), (1, 12), (2, 10), (3, 8)])
def test_zero_shards_a_ranks_state(base, stage, per_parameter):
    """fp32, two ranks: 4 bytes of parameters, 4 of gradients, 8 of Adam, of which the stage shards some."""
    plan = make_plan(replace(base, learner=replace(base.learner, ranks=2, zero_stage=stage)))
    parameters = plan.facts.parameters
    assert parameters is not None
    shown = dict(plan.memory)["a learner rank's state"]
    assert shown == f"{parameters * per_parameter / 2**20:.3g} MiB and activations"


def test_a_kl_term_adds_the_reference_model(base):
    config = replace(base, algorithm=replace(base.algorithm, options={**base.algorithm.options, "beta": 0.01}))
    plan = make_plan(config)
    assert plan.facts.parameters is not None
    assert (
        dict(plan.memory)["a learner rank's state"] == f"{plan.facts.parameters * 20 / 2**20:.3g} MiB and activations"
    )


def test_the_text_holds_the_numbers_in_a_hundred_columns(base):
    config = replace(base, algorithm=replace(base.algorithm, minibatches=1))
    text = render(make_plan(config), check(config))
    assert max(len(line) for line in text.splitlines()) <= WIDTH
    for part in (
        "arithmetic-ctpo-s0",
        "32 prompts x 8 samples = 256 sequences",
        "256 / 1 minibatches = 256 sequences",
        "256 sequences x 112 tokens = 28,672 tokens at most",
        "60 steps x 1 = 60 optimizer steps",
        "learner rank",
        "manifest.json",
        "summary.json",
        "Warning: algorithm.minibatches = 1",
    ):
        assert part in text
    assert "\x1b" not in text
    assert "\x1b[" in render(make_plan(config), color=True)


def test_the_tracker_decides_whether_wandb_is_written(base):
    without = replace(base, tracker=replace(base.tracker, name="none"))
    assert "wandb/" in dict(make_plan(base).written)
    assert "wandb/" not in dict(make_plan(without).written)


def test_planning_imports_nothing_heavy(tmp_path):
    program = (
        "import sys\n"
        "from rltk.checks import check; from rltk.compose import load; from rltk.model_folder import resolve_model\n"
        "from rltk.plan import make_plan; from rltk.plan_view import render\n"
        "config = resolve_model(load(sys.argv[1:])); print(render(make_plan(config), check(config)))\n"
        "heavy = ('torch', 'ray', 'vllm', 'transformers', 'deepspeed', 'wandb', 'huggingface_hub')\n"
        "print([name for name in heavy if name in sys.modules])"
    )
    command = [sys.executable, "-c", program, f"output={tmp_path}", "cluster.device=cpu"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "[]"
    assert list(tmp_path.iterdir()) == []  # a plan writes nothing
