"""What keeps a run from starting: each refusal names the keys, their values and the fix."""

from __future__ import annotations

import json
import os
from dataclasses import fields, is_dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import rltk.devices
from rltk.checks import check, corrections, run_dir
from rltk.compose import load
from rltk.config import Config
from rltk.devices import cores, gpus
from rltk.errors import ConfigError
from rltk.model_folder import facts, resolve_model
from rltk.placement import place


@pytest.fixture(scope="module")
def loaded() -> Config:
    return load([])


@pytest.fixture
def base(loaded, tmp_path, monkeypatch) -> Config:
    """The default run, in a folder of its own, on a machine without a GPU, an address or a key."""
    for name in ("CUDA_VISIBLE_DEVICES", "RAY_ADDRESS", "WANDB_API_KEY"):
        monkeypatch.delenv(name, raising=False)
    see_gpus(monkeypatch, 0)
    return replace(resolve_model(loaded), output=str(tmp_path / "runs"))


def see_gpus(monkeypatch, count: int) -> None:
    for module in ("rltk.devices", "rltk.placement", "rltk.checks"):
        monkeypatch.setattr(f"{module}.gpus", lambda: count)


def changed(config: Config, settings: dict[str, Any]) -> Config:
    for key, value in settings.items():
        group, _, name = key.rpartition(".")
        part = replace(getattr(config, group) if group else config, **{name: value})
        config = replace(config, **{group: part}) if group else part
    return config


def refusal(config: Config, settings: dict[str, Any] | None = None) -> str:
    with pytest.raises(ConfigError) as caught:
        check(changed(config, settings or {}))
    return str(caught.value)


def test_the_default_run_can_start_and_warns_of_nothing(base):
    assert check(base) == []


CASES: list[tuple[dict[str, Any], list[str]]] = [
    ({"algorithm.minibatches": 3}, ["32 * 8 = 256", "algorithm.minibatches = 3", "minibatches=4", "multiple of 3"]),
    ({"batch.samples": 1}, ["batch.samples = 1", "algorithm.min_group = 2", "batch.samples=2"]),
    ({"learner.ranks": 65}, ["64 to each", "learner.ranks = 65", "algorithm.minibatches = 4"]),
    ({"learner.old": "detach"}, ["learner.old = 'detach'", "minibatches = 1, not 4", "learner.old=recompute"]),
    ({"ratio.reference": "mu", "correction": "tis"}, ["ratio.reference = 'mu'", "'tis'", "correction=none"]),
    ({"ratio.reference": "new"}, ["ratio.reference = 'new'", "old, mu"]),
    ({"correction": "tsi"}, ["correction = 'tsi'", "did you mean tis?", "none, tis"]),
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
    ({"rollout.gpu_memory_share": 1.2}, ["rollout.gpu_memory_share = 1.2", "under 1"]),
    ({"task.max_response_tokens": 2000}, ["48 + 2000 = 2048", "of 1024", "response_tokens to 975", "config.json"]),
    ({"task.max_prompt_tokens": 1024}, ["1024 + 64 = 1088", "context of 1024", "lower task.max_prompt_tokens"]),
    ({"rollout.kv_cache_gib": 1e-5}, ["48 + 64 = 112", "rollout.kv_cache_gib = 1e-05", "rollout.kv_cache_gib=0.0002"]),
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


def test_an_evaluation_may_truncate_and_needs_no_batch_and_no_run_folder(base):
    run_dir(base).mkdir(parents=True)
    (run_dir(base) / "metrics.jsonl").write_text("{}\n")
    assert check(changed(base, {"rollout.top_p": 0.9, "batch.samples": 1}), training=False) == []


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


# The model


@pytest.fixture
def model(tmp_path) -> Path:
    """A complete folder of the smallest kind: 6 parameters."""
    folder = tmp_path / "model"
    folder.mkdir()
    shape = {"num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 1, "hidden_size": 64}
    (folder / "config.json").write_text(json.dumps({"max_position_embeddings": 256, **shape}))
    (folder / "tokenizer.json").write_text("{}")
    (folder / "tokenizer_config.json").write_text(json.dumps({"chat_template": "{{ messages }}"}))
    save_tensor(folder / "model.safetensors", (2, 3))
    return folder


def save_tensor(path: Path, shape: tuple[int, ...]) -> None:
    data = np.zeros(shape, np.float32).tobytes()
    header = json.dumps({"w": {"dtype": "F32", "shape": shape, "data_offsets": [0, len(data)]}}).encode()
    path.write_bytes(len(header).to_bytes(8, "little") + header + data)


def with_model(base: Config, folder: Path, template: str | None = None) -> Config:
    return resolve_model(replace(base, model=replace(base.model, path=str(folder), chat_template=template)))


def test_a_models_sizes_are_read_from_its_files(base, model):
    assert check(with_model(base, model)) == []
    assert facts(model).context == 256
    assert facts(model).parameters == 6
    assert facts(model).kv_values == 2 * 2 * 1 * 16


@pytest.mark.parametrize(
    ("missing", "said"),
    [
        ("config.json", "no config.json"),
        ("model.safetensors", "no weights"),
        ("tokenizer.json", "no tokenizer"),
        ("tokenizer_config.json", "no chat template; give one with model.chat_template="),
    ],
)
def test_a_model_folder_that_lacks_something_is_refused_by_its_name(base, model, missing, said):
    (model / missing).unlink()
    message = refusal(with_model(base, model))
    assert said in message and str(model) in message


def test_a_chat_template_may_be_a_file_of_its_own(base, model, tmp_path):
    (model / "tokenizer_config.json").write_text("{}")
    template = tmp_path / "chat.jinja"
    assert f"model.chat_template = '{template}': no such file" in refusal(with_model(base, model, str(template)))
    template.write_text("{{ messages }}")
    assert check(with_model(base, model, str(template))) == []
    (model / "chat_template.jinja").write_text("{{ messages }}")
    assert check(with_model(base, model)) == []


def test_weights_that_are_cut_short_or_pointers_are_refused(base, model):
    weights = model / "model.safetensors"
    whole = weights.read_bytes()
    for broken in (whole[:-1], b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", b""):
        weights.write_bytes(broken)
        assert "not a safetensors file" in refusal(with_model(base, model))


def test_a_shard_that_the_index_names_and_the_folder_lacks_is_refused(base, model):
    index = {"weight_map": {"a": "model.safetensors", "b": "model-2.safetensors"}}
    (model / "model.safetensors.index.json").write_text(json.dumps(index))
    assert "lacks model-2.safetensors" in refusal(with_model(base, model))


def test_a_models_path_becomes_absolute(base, model, monkeypatch):
    monkeypatch.chdir(model.parent)
    (model.parent / "t.jinja").write_text("x")
    resolved = with_model(base, Path("model"), "t.jinja").model
    assert (resolved.path, resolved.chat_template) == (str(model.resolve()), str(model.parent.resolve() / "t.jinja"))


def test_a_model_that_is_nowhere_is_refused(base):
    known = {"tinny": ["'tinny'", "did you mean tiny?"], "/no/such/dir": ["'/no/such/dir'", "owner/name"]}
    for path, parts in known.items():
        with pytest.raises(ConfigError) as caught:
            with_model(base, Path(path))
        for part in parts:
            assert part in str(caught.value)


def test_a_hub_id_comes_from_the_cache_and_without_one_says_so(base, tmp_path, monkeypatch):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    repository, commit = tmp_path / "models--owner--cached", "0123456789" * 4
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text(commit)
    (repository / "snapshots" / commit).mkdir(parents=True)
    assert with_model(base, Path("owner/cached")).model.path == str(repository / "snapshots" / commit)
    with pytest.raises(ConfigError) as caught:
        with_model(base, Path("owner/absent"))
    for part in ("model 'owner/absent'", "local cache", "HF_HUB_OFFLINE", "model=path/to/folder"):
        assert part in str(caught.value)


# Devices and placement


@pytest.mark.parametrize(
    ("visible", "count"),
    [(None, 2), ("", 0), ("-1", 0), ("1", 1), ("0,1", 2), ("0,-1,1", 1), ("GPU-abc", 1), ("0,1,2,3", 2)],
)
def test_gpus_are_the_device_files_that_cuda_may_see(tmp_path, monkeypatch, visible, count):
    for name in ("nvidia0", "nvidia1", "nvidiactl", "nvidia-uvm"):
        (tmp_path / name).touch()
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert gpus(tmp_path) == count


@pytest.mark.parametrize("have", [1, 2, 3, 8, 64])
@pytest.mark.parametrize(("engines", "ranks"), [(1, 1), (1, 2), (4, 4)])
def test_every_role_fits_into_the_cores(base, monkeypatch, have, engines, ranks):
    monkeypatch.setattr("rltk.placement.cores", lambda: have)
    config = changed(base, {"rollout.engines": engines, "learner.ranks": ranks})
    at = place(config)
    assert engines * at.engine_cpus + at.worker_cpus + at.reward_cpus + ranks * at.rank_cpus <= have
    assert min(at.engine_cpus, at.worker_cpus, at.reward_cpus, at.rank_cpus) > 0
    assert at.engine_threads == max(1, have // engines) and at.rank_threads == max(1, have // ranks)


def test_this_machine_has_cores():
    assert 1 <= cores() <= (os.cpu_count() or 1)


def test_one_gpu_is_shared_by_memory(base, monkeypatch):
    see_gpus(monkeypatch, 1)
    at = place(base)
    assert (at.device, at.gpu_shared) == ("gpu", True)
    assert at.engine_gpus + at.rank_gpus == pytest.approx(1.0) and at.engine_gpus == 0.4
    assert check(base) == []
    message = refusal(base, {"rollout.engines": 3})
    for part in ("rollout.engines = 3", "3 * 0.4 = 1.2", "rollout.gpu_memory_share to 0.17"):
        assert part in message
    assert "learner.ranks = 2 but 1 GPU(s)" in refusal(base, {"learner.ranks": 2})


def test_with_enough_gpus_every_role_has_its_own(base, monkeypatch):
    see_gpus(monkeypatch, 4)
    at = place(changed(base, {"rollout.engines": 2, "learner.ranks": 2}))
    assert (at.engine_gpus, at.rank_gpus, at.gpu_shared) == (1.0, 1.0, False)


def test_ranks_that_share_gpus_with_engines_cannot_share_one_with_each_other(base, monkeypatch):
    see_gpus(monkeypatch, 2)
    at = place(changed(base, {"rollout.engines": 2, "learner.ranks": 2}))
    assert at.gpu_shared and at.rank_gpus > 0.5 and at.engine_gpus + at.rank_gpus <= 1.0


def test_every_numeric_key_has_a_range(base):
    """A number that nobody bounds is a mistake nobody will hear of."""
    from rltk import value_checks

    bounded = {*value_checks.AT_LEAST_0, *value_checks.AT_LEAST_1, *value_checks.ABOVE_0}
    elsewhere = {"learner.beta1", "learner.beta2", "learner.zero_stage", "rollout.top_p", "rollout.top_k"}
    elsewhere |= {"rollout.gpu_memory_share"}
    numeric = {key for key, value in leaves(base) if type(value) in (int, float)}
    assert numeric == bounded | elsewhere


def leaves(part: Any, where: str = "") -> list[tuple[str, Any]]:
    found = []
    for field in fields(part):
        value, key = getattr(part, field.name), f"{where}{field.name}"
        found += leaves(value, f"{key}.") if is_dataclass(value) else [(key, value)]
    return found


def test_the_device_is_asked_only_where_auto_says_so(monkeypatch):
    monkeypatch.setattr("rltk.devices.gpus", lambda: 1)
    assert rltk.devices.device(Config().cluster) == "gpu"
    assert rltk.devices.device(replace(Config().cluster, device="cpu")) == "cpu"


def test_bf16_without_master_weights_is_refused(base):
    message = refusal(base, {"learner.zero_stage": 0, "learner.dtype": "bfloat16"})
    assert "learner.zero_stage = 0" in message and "bfloat16" in message and "learner.zero_stage=1" in message
    assert check(changed(base, {"learner.zero_stage": 1, "learner.dtype": "bfloat16"})) == []
