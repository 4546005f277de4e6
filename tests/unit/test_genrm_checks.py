"""A judge in a run: how it is asked for, what is refused before anything starts, what it takes of the machine."""

from __future__ import annotations

import socket

import pytest

from rltk import serve
from rltk.checks import check
from rltk.compose import load
from rltk.config import Config
from rltk.errors import ConfigError
from rltk.genrm_checks import genrm_problems, genrm_warnings
from rltk.manifest import compare, make_manifest
from rltk.model_folder import resolve_model
from rltk.placement import place
from rltk.plan import make_plan
from rltk.rewards.genrm.judges import asked_when
from rltk.rewards.genrm.options import GenRMOptions
from tests.integration.places import TINY
from tests.unit.checking import changed, see_gpus


def run(*argv: str) -> Config:
    return resolve_model(load(["cluster.device=cpu", f"reward.genrm={TINY}", "reward.genrm.context=512", *argv]))


def problems(config: Config) -> str:
    return "\n".join(genrm_problems(config))


@pytest.mark.parametrize(
    ("value", "name", "key", "expected"),
    [
        ("none", "none", "model", ""),
        ("tiny", "tiny", "model", "pkg://rltk.models/tiny_judge"),
        ("owner/judge-7b", "custom", "model", "owner/judge-7b"),
        ("./judge", "custom", "model", "./judge"),
        ("http://localhost:8000/v1", "server", "url", "http://localhost:8000/v1"),
    ],
)
def test_how_a_judge_is_named(value, name, key, expected):
    judge = load(
        [f"reward.genrm={value}", "reward.genrm.model=m"] if name == "server" else [f"reward.genrm={value}"]
    ).reward.genrm
    assert (judge.name, getattr(judge, key)) == (name, expected)


def test_without_a_word_there_is_none_and_its_keys_are_checked_all_the_same():
    assert load([]).reward.genrm == GenRMOptions()
    with pytest.raises(ConfigError, match=r"reward.genrm=tinny is not known \(did you mean tiny\?\)"):
        load(["reward.genrm=tinny"])
    with pytest.raises(ConfigError, match="nearest known key is reward.genrm.replicas"):
        load(["reward.genrm.replica=2"])
    with pytest.raises(ConfigError, match="write reward.genrm=mine"):
        load(["reward.genrm.name=mine"])


def test_an_experiment_may_choose_one_and_a_users_reward_may_have_one():
    config = load(
        ["reward=my_module:score", "reward.bonus=1", "reward.genrm=tiny", "reward.genrm.judge_options.seed=3"]
    )
    assert config.reward.options == {"bonus": 1} and config.reward.genrm.judge_options["seed"] == 3


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["reward.genrm.judge=pairwise"], "compares responses"),
        (["reward.genrm.judge=fappo"], "reward.genrm.judge = 'fappo': unknown judge 'fappo' (did you mean fapo?)"),
        (["reward.genrm.judge_options.max_token=9"], "did you mean max_tokens?"),
        (["reward.genrm.judge_options.max_tokens=500"], "leaves a prompt no room in reward.genrm.context = 512"),
        (["reward.genrm.context=4096"], "over the judge model's"),
        (["reward.genrm.attempt_s=200"], "set reward.genrm.attempt_s=60"),
        (["reward.genrm.canary_file=nowhere.jsonl"], "canaries cannot be read from nowhere.jsonl"),
        (["reward.genrm.enforce_eager=false"], "CUDA graphs"),
        (["reward.genrm.judge=answer_equivalence", "reward.genrm.on_failure=flawed"], "is not asked about those"),
    ],
)
def test_what_cannot_judge_is_refused_with_the_fix(argv, words):
    assert words in problems(run(*argv))


def test_a_port_that_is_none_or_taken_is_refused_before_ray_starts():
    with socket.create_server(("127.0.0.1", 0)) as taken:
        for port, words in ((str(taken.getsockname()[1]), "cannot be had"), ("65536", "1 to 65535"), ("x", "a number")):
            with pytest.raises(ConfigError, match=words):
                serve.main(["reward.genrm=tiny", f"port={port}"])


def test_another_judge_is_not_given_the_options_of_the_choices_own():
    """`reward.genrm=tiny` has a template for the judge fapo."""
    assert run("reward.genrm=tiny", "reward.genrm.judge=answer_equivalence").reward.genrm.judge_options == {}
    assert problems(run("reward.genrm=tiny", "reward.genrm.judge=tests.integration.genrm_judge:Echo")) == ""
    same = run(
        "reward.genrm=tiny", "reward.genrm.judge=fapo", "reward.genrm.judge_options.seed=3"
    ).reward.genrm.judge_options
    assert same == {"template": "fapo_short.v1", "max_tokens": 128, "seed": 3}
    docs = "reward.genrm.judge_options={judges:[fapo,{name:fapo,seed:1,temperature:0.6}],combine:worst}"
    assert problems(run("reward.genrm=tiny", "reward.genrm.judge=ensemble", docs)) == ""


def test_a_server_needs_an_address_and_a_name():
    with pytest.raises(ConfigError, match=r"reward\.genrm\.url has no value: write reward\.genrm=http"):
        resolve_model(load(["reward.genrm=server", "reward.genrm.model=m"]))
    ours = resolve_model(load(["reward.genrm=tiny", "reward.genrm.url=http://h/v1"]))
    assert "a server has models of its own; write reward.genrm=http://h/v1" in problems(ours)
    config = resolve_model(load(["reward.genrm=http:///v1", "reward.genrm.model=m"]))
    assert "is no address" in problems(config)
    config = changed(config, {"reward.genrm": GenRMOptions(name="server", url="http://h:1/v1")})
    assert "set reward.genrm.model=<name>" in problems(config)


def test_a_folder_that_is_no_model_is_refused_by_its_own_key(tmp_path):
    config = load([f"reward.genrm={tmp_path}"])
    assert f"model folder {tmp_path} has no config.json" in problems(resolve_model(config))
    with pytest.raises(ConfigError, match="reward.genrm '/not/there': no such folder"):
        resolve_model(load(["reward.genrm=/not/there"]))


def test_a_label_that_nobody_reads_is_told():
    assert "set algorithm=fapo" in "\n".join(genrm_warnings(run("algorithm=grpo"), training=True))
    assert list(genrm_warnings(run("algorithm=fapo"), training=True)) == []
    assert list(genrm_warnings(run("algorithm=grpo"), training=False)) == []


def test_which_samples_a_judge_is_for():
    assert asked_when(GenRMOptions(judge="fapo")) == "right"
    assert asked_when(GenRMOptions(judge="answer_equivalence")) == "wrong"
    members = {"judges": ["fapo", {"name": "fapo", "seed": 1}]}
    assert asked_when(GenRMOptions(judge="ensemble", judge_options=members)) == "right"
    mixed = {"judges": ["fapo", "answer_equivalence"]}
    assert asked_when(GenRMOptions(judge="ensemble", judge_options=mixed)) == "all"
    assert asked_when(GenRMOptions(judge="tests.integration.genrm_judge:Echo")) == "all"


def test_it_takes_its_part_of_the_machine_and_the_plan_says_so(monkeypatch, tmp_path):
    config = run(f"output={tmp_path}", "algorithm=fapo")
    assert place(config).judge_cpus > 0 and place(config).judge_gpus == 0
    assert {role.name for role in make_plan(config).roles} >= {"judge", "genrm service"}
    see_gpus(monkeypatch, 1)
    config = changed(
        config, {"cluster.device": "gpu", "rollout.gpu_memory_share": 0.3, "reward.genrm.gpu_memory_share": 0.3}
    )
    at = place(config)
    assert (at.gpu_shared, at.judge_gpus, at.learner_memory_share) == (True, 0.3, 0.4)
    check(config)
    greedy = changed(config, {"reward.genrm.gpu_memory_share": 0.8})
    assert "leave the learner nothing" in problems(greedy)
    see_gpus(monkeypatch, 3)
    assert (place(config).gpu_shared, place(config).judge_gpus) == (False, 1.0)


def test_a_server_takes_none_of_it():
    config = resolve_model(load(["cluster.device=cpu", "reward.genrm=http://h:1/v1", "reward.genrm.model=m"]))
    assert place(config) == place(resolve_model(load(["cluster.device=cpu"])))
    roles = {role.name: role.note for role in make_plan(config).roles}
    assert "judge" not in roles and "http://h:1/v1" in roles["genrm service"]


def test_a_resume_may_have_more_replicas_but_no_other_judge():
    old = make_manifest(run("algorithm=fapo"))
    refused, accepted = compare(old, make_manifest(run("algorithm=fapo", "reward.genrm.replicas=2")))
    assert refused == [] and accepted == ["reward.genrm.replicas: 1 -> 2"]
    refused, _ = compare(old, make_manifest(run("algorithm=fapo", "reward.genrm.judge_options.seed=1")))
    assert any(line.startswith("reward.genrm.judge_options") for line in refused)
    refused, _ = compare(old, make_manifest(resolve_model(load(["algorithm=fapo"]))))
    assert any(line.startswith("reward.genrm.hash") for line in refused)
