"""What the model folder must hold and the machine must have; what is read off both."""

from __future__ import annotations

import json
import os
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

import rltk.devices
from rltk.checks import check
from rltk.config import Config
from rltk.devices import cores, gpus
from rltk.errors import ConfigError
from rltk.model_folder import facts, resolve_model
from rltk.placement import job_shares, place, served_engines
from rltk.rollout.tools.options import ToolOptions
from rltk.rollout.worker import _split
from tests.unit.checking import changed, refusal, see_gpus

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


def test_weights_that_lie_there_again_in_another_format_are_left_alone(base, model):
    """As Mistral's do: counted, they would double the model."""
    before = facts(model)
    (model / "consolidated.safetensors").write_bytes(b"")
    index = {"weight_map": {"a": "consolidated-00001.safetensors"}}
    (model / "consolidated.safetensors.index.json").write_text(json.dumps(index))
    assert check(with_model(base, model)) == [] and facts(model) == before


def with_keys(folder: Path, **keys) -> None:
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | keys))


LONGROPE = {"rope_type": "longrope", "original_max_position_embeddings": 111}


@pytest.mark.parametrize(
    ("keys", "parts"),
    [
        ({"attn_logit_softcapping": 50.0}, ["attn_logit_softcapping = 50 ", "config.json", "choose another model"]),
        ({"sliding_window": 111}, ["sliding_window = 111", "48 + 64 = 112", "task.max_response_tokens to 63"]),
        ({"sliding_window": 40}, ["sliding_window = 40", "lower task.max_prompt_tokens"]),
        ({"sliding_window": 111, "layer_types": ["sliding_attention", "full_attention"]}, ["sliding_window = 111"]),
        ({"sliding_window": 111, "use_sliding_window": True, "max_window_layers": 1}, ["sliding_window = 111"]),
        ({"rope_parameters": LONGROPE}, ["original_max_position_embeddings = 111", "longrope", "113", "tokens to 62"]),
        ({"rope_scaling": {"type": "su"}, "original_max_position_embeddings": 112}, ["= 112", "longrope", "to 63"]),
        ({"text_config": {"attn_logit_softcapping": 30.0}}, ["attn_logit_softcapping = 30"]),
    ],
)
def test_a_model_that_the_learner_cannot_train_is_refused_before_it_is_loaded(base, model, keys, parts):
    with_keys(model, **keys)
    message = refusal(with_model(base, model))
    for part in parts:
        assert part in message
    assert check(with_model(base, model), training=False) == []  # vLLM knows them all


@pytest.mark.parametrize(
    "keys",
    [
        {"attn_logit_softcapping": None},
        {"sliding_window": 112},
        {"sliding_window": None, "use_sliding_window": True},
        {"sliding_window": 40, "use_sliding_window": False},
        {"sliding_window": 40, "layer_types": ["full_attention", "full_attention"]},
        {"sliding_window": 40, "use_sliding_window": True, "max_window_layers": 2},
        {"rope_parameters": LONGROPE | {"original_max_position_embeddings": 113}},
        {"rope_parameters": LONGROPE | {"rope_type": "yarn"}},
        {"rope_scaling": None},
        {"rope_parameters": {"full_attention": {"rope_type": "default"}, "sliding_attention": {}}},
    ],
)
def test_a_model_whose_config_only_mentions_it_is_trained(base, model, keys):
    with_keys(model, **keys)
    assert check(with_model(base, model)) == []


def test_a_window_is_measured_against_all_that_is_learned_from(base, model):
    with_keys(model, sliding_window=150, max_position_embeddings=4096)
    assert check(with_model(base, model)) == []
    tools = replace(with_model(base, model), tools=ToolOptions(name="python", use=["python"], total_tokens=300))
    assert "tools.total_tokens = 48 + 64 + 300 = 412 tokens" in refusal(tools)


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


def test_the_device_is_asked_only_where_auto_says_so(monkeypatch):
    monkeypatch.setattr("rltk.devices.gpus", lambda: 1)
    assert rltk.devices.device(Config().cluster) == "gpu"
    assert rltk.devices.device(replace(Config().cluster, device="cpu")) == "cpu"


def test_ranks_that_two_to_a_gpu_would_hold_are_refused(base, monkeypatch):
    """Ray would put both on the first GPU; NCCL needs one a rank."""
    see_gpus(monkeypatch, 2)
    crowded = changed(base, {"rollout.engines": 3, "learner.ranks": 2})
    assert place(crowded).rank_gpus == pytest.approx(0.2)
    message = refusal(crowded)
    for part in ("learner.ranks = 2", "2 engine(s) a GPU", "= 0.4", "rollout.gpu_memory_share=0.24", "learner.ranks=1"):
        assert part in message
    assert check(changed(crowded, {"rollout.gpu_memory_share": 0.24})) == []
    assert check(changed(crowded, {"learner.ranks": 1})) == []
    assert "gpu_memory_share=0.49" in refusal(crowded, {"rollout.engines": 2, "rollout.gpu_memory_share": 0.5})


@pytest.mark.parametrize("engines", range(1, 6))
@pytest.mark.parametrize("jobs", [0, 1, 3, 7, 32])
def test_an_engine_sees_the_same_requests_for_any_number_of_workers(jobs, engines):
    alone = _split(list(range(jobs)), engines)
    for workers in range(1, engines + 1):
        seen = []
        for share, served in zip(job_shares(jobs, engines, workers), served_engines(engines, workers), strict=True):
            seen += _split(list(range(jobs))[share], len(served))
        assert seen == alone
