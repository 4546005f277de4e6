"""What keeps a run from starting: each refusal names the keys, their values and the fix."""

from __future__ import annotations

from dataclasses import fields, is_dataclass, replace
from typing import Any

import pytest

from rltk.checks import check, corrections, run_dir
from rltk.errors import ConfigError
from tests.unit.checking import changed, refusal


def test_the_default_run_can_start_and_warns_of_nothing(base):
    assert check(base) == []


CASES: list[tuple[dict[str, Any], list[str]]] = [
    ({"algorithm.minibatches": 3}, ["32 * 8 = 256", "algorithm.minibatches = 3", "minibatches=4", "multiple of 3"]),
    ({"batch.samples": 1}, ["batch.samples = 1", "algorithm.min_group = 2", "batch.samples=2"]),
    ({"learner.ranks": 65}, ["64 to each", "learner.ranks = 65", "algorithm.minibatches = 4"]),
    ({"learner.old": "detach"}, ["learner.old = 'detach'", "minibatches = 1, not 4", "learner.old=recompute"]),
    ({"ratio.reference": "mu", "correction": "tis"}, ["ratio.reference = 'mu'", "'tis'", "correction=none"]),
    ({"ratio.reference": "new"}, ["ratio.reference = 'new'", "old, mu"]),
    ({"correction": "tsi"}, ["correction = 'tsi'", "did you mean tis?", "none, ", "tis, or to your own"]),
    ({"rollout.top_p": 0.9}, ["rollout.top_p = 0.9", "biases every ratio by the kept mass", "rollout.top_p=1.0"]),
    ({"rollout.top_k": 50}, ["rollout.top_k = 50", "biases every ratio by the kept mass", "rollout.top_k=0"]),
    ({"rollout.temperature": 0.0}, ["rollout.temperature = 0.0", "above 0"]),
    ({"rollout.dtype": "float16"}, ["rollout.dtype = 'float16'", "did you mean bfloat16?", "float32, bfloat16"]),
    ({"learner.dtype": "half"}, ["learner.dtype = 'half'", "float32, bfloat16"]),
    ({"learner.zero_stage": 4}, ["learner.zero_stage = 4", "0, 1, 2 or 3"]),
    ({"learner.schedule": "cosin"}, ["learner.schedule = 'cosin'", "did you mean cosine?"]),
    ({"learner.beta2": 1.0}, ["learner.beta2 = 1.0", "under 1"]),
    ({"learner.lr": 0.0}, ["learner.lr = 0.0", "above 0"]),
    ({"steps": 0}, ["steps = 0", "at least 1"]),
    ({"evaluation.every": -1}, ["evaluation.every = -1", "at least 0"]),
    ({"resume": "always"}, ["resume = 'always'", "never, auto"]),
    ({"pipeline.max_staleness": 1}, ["pipeline.max_staleness = 1", "cannot overlap yet", "pipeline.max_staleness=0"]),
    ({"tracker.mode": "online"}, ["tracker.mode = 'online'", "WANDB_API_KEY", "tracker.mode=offline"]),
    ({"cluster.device": "gpu"}, ["cluster.device = 'gpu'", "no NVIDIA GPU", "cluster.device=cpu"]),
    ({"cluster.name": "existing"}, ["cluster=existing", "cluster.address", "RAY_ADDRESS"]),
    ({"cluster.address": "head:6379"}, ["cluster.address = 'head:6379'", "cluster=local", "cluster=existing"]),
    ({"rollout.enforce_eager": False}, ["rollout.enforce_eager = False", "CPU", "rollout.enforce_eager=true"]),
    ({"rollout.workers": 2}, ["rollout.workers = 2", "rollout.engines = 1", "rollout.workers=1"]),
    ({"batch.refills": -1}, ["batch.refills = -1", "at least 0"]),
    ({"rollout.gpu_memory_share": 1.2}, ["rollout.gpu_memory_share = 1.2", "under 1"]),
    ({"task.max_response_tokens": 2000}, ["48 + 2000 = 2048", "of 1024", "response_tokens to 975", "config.json"]),
    ({"task.max_prompt_tokens": 1024}, ["1024 + 64 = 1088", "context of 1024", "lower task.max_prompt_tokens"]),
    ({"rollout.kv_cache_gib": 1e-5}, ["48 + 64 = 112", "rollout.kv_cache_gib = 1e-05", "rollout.kv_cache_gib=0.0003"]),
    ({"name": "a/b"}, ["name = 'a/b'", "letters"]),
    ({"algorithm.name": "custom"}, ["algorithm=custom", "algorithm=my_module:name", "algorithm.path"]),
    ({"reward.path": "m:f"}, ["reward.path = 'm:f'", "reward=rule", "reward=m:f"]),
    ({"task.target": "tasks.py"}, ["task.target = 'tasks.py'", "module:attribute"]),
]  # fmt: skip


@pytest.mark.parametrize(
    ("settings", "parts"), CASES, ids=lambda case: " ".join(case) if isinstance(case, dict) else ""
)
def test_a_run_that_cannot_start_is_refused(base, settings, parts):
    message = refusal(base, settings)
    for part in parts:
        assert part in message


def test_all_problems_are_told_at_once(base):
    message = refusal(base, {"rollout.top_p": 0.5, "steps": 0, "algorithm.minibatches": 7})
    assert message.startswith("3 things to fix\n")
    assert message.count("\n  - ") == 3


def test_an_evaluation_needs_no_batch_and_no_run_folder(base):
    run_dir(base).mkdir(parents=True)
    (run_dir(base) / "metrics.jsonl").write_text("{}\n")
    assert check(changed(base, {"batch.samples": 1}), training=False) == []


@pytest.mark.parametrize(("key", "value", "off"), [("rollout.top_p", 0.9, 1.0), ("rollout.top_k", 50, 0)])
def test_an_evaluation_refuses_truncated_sampling_which_it_would_not_do(base, key, value, off):
    with pytest.raises(ConfigError) as caught:
        check(changed(base, {key: value}), training=False)
    for part in (f"{key} = {value} is refused in an evaluation", f"set {key}={off}"):
        assert part in str(caught.value)


def test_keys_in_the_environment_are_enough(base, monkeypatch):
    monkeypatch.setenv("WANDB_API_KEY", "present")
    monkeypatch.setenv("RAY_ADDRESS", "head:6379")
    assert check(changed(base, {"tracker.mode": "online", "cluster.name": "existing"})) == []


def test_the_known_corrections_are_the_files():
    assert {"none", "tis"} <= set(corrections())
    assert "correction" not in corrections()


# Warnings


def test_one_minibatch_against_old_is_called_what_it_is(base):
    (warning,) = check(changed(base, {"algorithm.minibatches": 1}))
    assert "algorithm.minibatches = 1" in warning and "ctpo is REINFORCE" in warning
    assert check(changed(base, {"algorithm.minibatches": 1, "ratio.reference": "mu"})) == []


def test_small_buffers_are_slow_not_wrong(base):
    (packed,) = check(changed(base, {"learner.tokens_per_micro_batch": 100}))
    assert "tokens_per_micro_batch = 100" in packed and "112 tokens" in packed
    (cached,) = check(changed(base, {"rollout.kv_cache_gib": 0.01}))
    assert "rollout.kv_cache_gib = 0.01" in cached and "256 sequences" in cached


# Run folder


def test_a_run_folder_that_exists_is_refused_without_resume(base):
    folder = run_dir(base)
    folder.mkdir(parents=True)
    assert check(base) == []  # empty: nothing to lose
    (folder / "manifest.json").write_text("{}")
    message = refusal(base)
    for part in (str(folder), "resume=auto", "another name", "remove"):
        assert part in message
    assert check(replace(base, resume="auto")) == []


def test_a_folder_that_is_no_run_cannot_be_resumed(base):
    run_dir(base).mkdir(parents=True)
    (run_dir(base) / "notes.txt").write_text("mine")
    assert "no manifest.json" in refusal(base, {"resume": "auto"})


def test_a_file_in_the_place_of_the_run_folder_is_refused(base):
    run_dir(base).parent.mkdir(parents=True)
    run_dir(base).write_text("")
    assert "is a file" in refusal(base)


def test_every_numeric_key_has_a_range(base):
    """A number that nobody bounds is a mistake nobody will hear of."""
    from rltk import value_checks

    bounded = {*value_checks.AT_LEAST_0, *value_checks.AT_LEAST_1, *value_checks.ABOVE_0}
    elsewhere = {"learner.beta1", "learner.beta2", "learner.zero_stage", "rollout.top_p", "rollout.top_k"}
    elsewhere |= {"rollout.gpu_memory_share", "reward.genrm.gpu_memory_share"}
    numeric = {key for key, value in leaves(base) if type(value) in (int, float)}
    assert numeric == bounded | elsewhere


def leaves(part: Any, where: str = "") -> list[tuple[str, Any]]:
    found = []
    for field in fields(part):
        value, key = getattr(part, field.name), f"{where}{field.name}"
        found += leaves(value, f"{key}.") if is_dataclass(value) else [(key, value)]
    return found


def test_bf16_without_master_weights_is_refused(base):
    message = refusal(base, {"learner.zero_stage": 0, "learner.dtype": "bfloat16"})
    assert "learner.zero_stage = 0" in message and "bfloat16" in message and "learner.zero_stage=1" in message
    assert check(changed(base, {"learner.zero_stage": 1, "learner.dtype": "bfloat16"})) == []
