"""What makes two runs the same run, and files that are whole or absent."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml

from rltk import manifest
from rltk.compose import load
from rltk.config import Config
from rltk.errors import ConfigError
from rltk.files import append_jsonl, write_json, write_text
from rltk.model_folder import resolve_model


@pytest.fixture(scope="module")
def base() -> Config:
    return resolve_model(load([]))


@pytest.fixture(scope="module")
def made(base) -> dict[str, Any]:
    return manifest.make_manifest(base, wandb_id="abc")


def test_a_manifest_names_the_run_and_what_it_stands_on(base, made):
    assert (made["name"], made["seed"], made["wandb_id"]) == ("arithmetic-ctpo-s0", 0, "abc")
    assert made["versions"]["ray"] and made["versions"]["torch"]
    assert len(made["config_hash"]) == 16 and len(made["model_hash"]) == 32
    assert made["code"]
    assert {*made["result_changing"], *made["accepted"]} == {*manifest.flatten(base), "model.hash"}


RESULTS = (
    "algorithm.name algorithm.path algorithm.minibatches algorithm.clip_low task.name task.target "
    "task.max_prompt_tokens task.max_response_tokens task.levels batch.prompts batch.samples seed "
    "rollout.temperature rollout.top_p rollout.top_k rollout.dtype reward.name reward.path correction "
    "ratio.reference learner.lr learner.schedule "
    "learner.warmup_steps learner.beta1 learner.beta2 learner.eps learner.weight_decay learner.max_grad_norm "
    "learner.dtype learner.old pipeline.max_staleness debug.permute_rewards model.hash"
)
PLACEMENT = (
    "rollout.engines rollout.workers learner.ranks learner.zero_stage learner.tokens_per_micro_batch reward.workers "
    "cluster.name cluster.device tracker.mode tracker.console deadlines.sync checkpoint.every checkpoint.keep "
    "evaluation.every evaluation.problems steps output resume dry_run model.path"
)


def test_what_changes_results_and_what_does_not(made):
    assert set(RESULTS.split()) <= set(made["result_changing"])
    assert set(PLACEMENT.split()) <= set(made["accepted"])
    assert not set(made["result_changing"]) & set(made["accepted"])


def test_a_key_that_nobody_classified_changes_results():
    assert not manifest._accepted("kv.policy") and not manifest._accepted("rollout.something_new")
    assert not manifest._accepted("stepsize")  # `steps` is a key, not a beginning


def test_every_accepted_key_exists(base):
    keys = manifest.flatten(base)
    for item in manifest.ACCEPTED:
        assert any(key.startswith(item) if item.endswith(".") else key == item for key in keys), item


def test_the_same_run_elsewhere_and_faster_is_accepted_and_named(base, made):
    other = replace(
        base,
        steps=90,
        learner=replace(base.learner, ranks=2, zero_stage=3),
        rollout=replace(base.rollout, engines=4),
        resume="auto",
    )
    accepted = manifest.check_resume(made, manifest.make_manifest(other))
    assert accepted == [
        "learner.ranks: 1 -> 2",
        "learner.zero_stage: 1 -> 3",
        "rollout.engines: 1 -> 4",
        "steps: 60 -> 90",
    ]


def test_another_run_is_refused_and_every_key_listed_with_both_values(base, made):
    options = {**base.algorithm.options, "clip_low": 0.5}
    other = replace(
        base, seed=1, algorithm=replace(base.algorithm, options=options), learner=replace(base.learner, lr=1.0, ranks=2)
    )
    with pytest.raises(ConfigError) as caught:
        manifest.check_resume(made, manifest.make_manifest(other))
    message = str(caught.value)
    for line in ("algorithm.clip_low: 0.025 -> 0.5", "learner.lr: 0.0001 -> 1.0", "seed: 0 -> 1", "name=..."):
        assert line in message
    assert "ranks" not in message


def test_an_option_that_appears_or_goes_is_a_difference(made):
    new = {**made, "result_changing": {**made["result_changing"], "algorithm.extra": 1}}
    assert manifest.compare(made, new)[0] == ["algorithm.extra: '(absent)' -> 1"]
    assert manifest.compare(new, made)[0] == ["algorithm.extra: 1 -> '(absent)'"]


def test_other_code_and_versions_are_accepted_and_named(made):
    new = {**made, "code": "v9", "versions": {**made["versions"], "ray": "9.9"}}
    refused, accepted = manifest.compare(made, new)
    assert refused == []
    assert f"code: {made['code']!r} -> 'v9'" in accepted
    assert f"version of ray: {made['versions']['ray']!r} -> '9.9'" in accepted


def test_a_model_is_what_its_folder_holds_not_where_it_lies(base, made, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(base.model.path, copy)
    moved = replace(base, model=replace(base.model, path=str(copy)))
    assert manifest.compare(made, manifest.make_manifest(moved))[0] == []
    weights = next(copy.glob("*.safetensors"))
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    (refused,) = manifest.compare(made, manifest.make_manifest(moved))[0]
    assert refused.startswith("model.hash: ")


def test_a_data_set_is_its_content(base, tmp_path):
    def with_data(path: Path) -> dict[str, Any]:
        return manifest.result_changing(replace(base, task=replace(base.task, options={"path": str(path)})))

    first, second = tmp_path / "a.jsonl", tmp_path / "b.jsonl"
    first.write_text("{}\n")
    second.write_text("{}\n")
    assert with_data(first) == with_data(second)
    second.write_text("{} \n")
    assert with_data(first)["task.path.hash"] != with_data(second)["task.path.hash"]


def test_the_config_hash_is_that_of_the_results(base, made):
    same = manifest.make_manifest(replace(base, steps=1, name="other"))
    other = manifest.make_manifest(replace(base, seed=1))
    assert same["config_hash"] == made["config_hash"] != other["config_hash"]


def test_a_run_folders_files_can_be_read_back(base, made, tmp_path):
    folder = tmp_path / "new" / "run"
    manifest.write(folder, base, made)
    assert manifest.read(folder) == json.loads(json.dumps(made))
    assert manifest.check_resume(manifest.read(folder), manifest.make_manifest(base)) == []
    written = yaml.safe_load((folder / "config.yaml").read_text())
    assert written["algorithm"]["clip_low"] == base.algorithm.options["clip_low"]
    assert written["learner"]["lr"] == base.learner.lr
    assert sorted(file.name for file in folder.iterdir()) == ["config.yaml", "manifest.json"]


def test_every_start_of_a_run_has_an_incarnation_of_its_own(base, made, tmp_path):
    manifest.write(tmp_path, base, made)
    assert [manifest.next_incarnation(tmp_path) for _ in range(3)] == [0, 1, 2]
    resumed = made | {"incarnation": manifest.read(tmp_path)["incarnation"]}  # what an entry point carries over
    manifest.write(tmp_path, base, resumed)
    assert manifest.next_incarnation(tmp_path) == 3


@pytest.mark.parametrize("content", [None, "{", "[]", "{}"])
def test_a_manifest_that_cannot_be_read_is_refused(tmp_path, content):
    if content is not None:
        (tmp_path / "manifest.json").write_text(content)
    with pytest.raises(ConfigError, match=r"manifest\.json .*name="):
        manifest.read(tmp_path)


# Files


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path):
    path = tmp_path / "a.json"
    write_json(path, {"a": 1})
    with pytest.raises(ValueError):
        write_json(path, {"a": float("nan")})
    with pytest.raises(UnicodeEncodeError):
        write_text(path, "whole\ud800")
    assert json.loads(path.read_text()) == {"a": 1}
    assert [file.name for file in tmp_path.iterdir()] == ["a.json"]


def test_rows_are_appended_one_a_line(tmp_path):
    path = tmp_path / "rows.jsonl"
    append_jsonl(path, {"step": 1, "text": "two\nlines"})
    append_jsonl(path, {"step": 2})
    assert [json.loads(line)["step"] for line in path.read_text().splitlines()] == [1, 2]
