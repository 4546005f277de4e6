"""The command line to a Config: what is composed, what is rewritten, and how every wrong word is refused."""

from __future__ import annotations

import dataclasses
import functools
import re
from copy import deepcopy
from functools import reduce
from pathlib import Path

import pytest

import rltk.compose
from rltk.cli import MAIN_KEYS, run_entry, usage
from rltk.compose import groups, load, rewrite
from rltk.config import Config, Model
from rltk.convert import convert
from rltk.errors import ConfigError
from rltk.manifest import flatten
from rltk.nearest import nearest, nearest_key

DOCS = Path(__file__).parents[2] / "docs" / "configuration.md"


@pytest.fixture(autouse=True, scope="module")
def compose_each_choice_once():
    """Composing reads some twenty files; the settings, which most tests are about, come after it."""
    original = rltk.compose._compose
    composed = functools.cache(lambda choices: original(dict(choices)))
    rltk.compose._compose = lambda choices: deepcopy(composed(tuple(choices.items())))
    yield
    rltk.compose._compose = original


@pytest.fixture(scope="module")
def default() -> Config:
    return load([])


def refusal(*argv: str) -> str:
    with pytest.raises(ConfigError) as caught:
        load(list(argv))
    return str(caught.value)


def test_the_composed_defaults_are_the_dataclasses_defaults(default):
    plain = Config()
    for field in dataclasses.fields(Config):
        if field.name not in ("algorithm", "task", "model", "name"):
            assert getattr(default, field.name) == getattr(plain, field.name), field.name
    assert default.name == "arithmetic-ctpo-s0"
    assert (default.algorithm.name, default.algorithm.minibatches) == ("ctpo", plain.algorithm.minibatches)
    assert default.algorithm.options["min_group"] == 2


def test_settings_and_choices_reach_the_config():
    config = load(["algorithm=grpo", "learner.lr=5e-5", "steps=3", "seed=7", "task.levels=[1,2]", "output='a b'"])
    assert config.algorithm.name == "grpo"
    assert config.learner.lr == 5e-5
    assert config.task.options["levels"] == [1, 2]
    assert (config.steps, config.output, config.name) == (3, "a b", "arithmetic-grpo-s7")


def test_a_whole_number_is_a_float_where_a_float_is_due():
    config = load(["rollout.temperature=1", "learner.lr=1"])
    assert isinstance(config.rollout.temperature, float) and isinstance(config.learner.lr, float)


def test_an_experiment_sets_keys_and_the_command_line_has_the_last_word():
    config = load(["experiment=smoke", "batch.prompts=6"])
    assert (config.steps, config.batch.prompts, config.batch.samples) == (2, 6, 4)


def test_every_choice_composes_and_bears_its_name():
    """The n-th choice of every group together: each choice is met, with few compositions."""
    known = {group: choices for group, choices in groups().items() if group != "experiment"}
    needs = {
        "task=custom": ["task.target=m:T"],
        "task=jsonl": ["task.path=p.jsonl"],
        "task=judging_jsonl": ["task.path=p.jsonl"],
        "task=reasoning_gym": ["task.dataset=gcd"],
        "model=custom": ["model.path=p"],
        "reward/genrm=custom": ["reward.genrm.model=p"],
        "reward/genrm=server": ["reward.genrm.url=http://h/v1", "reward.genrm.model=m"],
        "kv=dapq_longflow": ["kv.budget=64"],
    }
    for number in range(max(map(len, known.values()))):
        chosen = {group: choices[number % len(choices)] for group, choices in known.items()}
        argv = [f"{group}={choice}" for group, choice in chosen.items()]
        config = load([*argv, *(setting for argument in argv for setting in needs.get(argument, []))])
        for group, choice in chosen.items():
            assert getattr(reduce(getattr, group.split("/"), config), "name", choice) == choice


@pytest.mark.parametrize("experiment", groups()["experiment"])
def test_every_experiment_composes(experiment):
    assert load([f"experiment={experiment}"]).steps >= 1


# The user's own code and models


def test_own_objective_task_and_reward_are_plugged_in_by_path():
    argv = ["algorithm=pkg.mod:Mine", "algorithm.width=3", "task=mod:T", "+task.files=[a,b]", "reward=mod:score"]
    config = load([*argv, "reward.deep.er=1"])
    assert (config.algorithm.name, config.algorithm.path) == ("custom", "pkg.mod:Mine")
    assert config.algorithm.options == {"width": 3}
    assert (config.task.target, config.task.options) == ("mod:T", {"files": ["a", "b"]})
    assert (config.reward.path, config.reward.options) == ("mod:score", {"deep": {"er": 1}})


@pytest.mark.parametrize("path", ["some/folder", "owner/Model-0.6B", "/data/a b (1), c=d/m", 'it\'s "here"/m', "~/m/"])
def test_any_folder_or_hub_id_is_a_model(path):
    model = load([f"model={path}"]).model
    assert model.path == path
    assert model.name == path.rstrip("/").rsplit("/", 1)[-1]


def test_a_snapshot_in_the_hub_cache_is_named_by_its_model_not_by_its_commit():
    path = "/c/models--owner--Small-1B/snapshots/" + "0" * 39 + "a"
    assert load([f"model={path}"]).model == Model(name="Small-1B", path=path)


def test_packaged_models_are_not_rewritten():
    assert rewrite(["model=tiny", "algorithm=ctpo"], {}) == ["model=tiny", "algorithm=ctpo"]


def test_aliases_stand_for_keys():
    assert load(["samples=2"], aliases={"samples": "evaluation.samples"}).evaluation.samples == 2


def test_correction_options_are_free():
    assert load(["correction=tis", "correction_options.cap=3.5"]).correction_options == {"cap": 3.5}


# Bad input: the thing, the value, the fix


@pytest.mark.parametrize(
    ("argument", "parts"),
    [
        ("rollout.engine=2", ["rollout.engine ", "2", "rollout.engines"]),
        ("lr=3", ["unknown key lr", "3", "learner.lr"]),
        ("batch.promts=4", ["batch.promts", "4", "batch.prompts"]),
        ("algorithm.clip_lo=.2", ["algorithm.clip_lo ", "0.2", "algorithm.clip_low"]),
        ("+algorithm.clip_hi=.2", ["algorithm.clip_hi ", "0.2", "algorithm.clip_high"]),
        ("++batch.sample=4", ["batch.sample ", "4", "batch.samples"]),
        ("algoritm=grpo", ["algoritm", "'grpo'", "algorithm"]),
        ("hydra.run.dir=x", ["hydra.run.dir", "--help"]),
    ],
)
def test_an_unknown_key_is_refused_with_the_nearest_known_one(argument, parts):
    message = refusal(argument)
    assert message.startswith("unknown key")
    for part in parts:
        assert part in message


def test_an_unknown_choice_names_the_nearest_and_lists_all():
    message = refusal("algorithm=ctpoo")
    assert "algorithm=ctpoo" in message and "did you mean ctpo?" in message
    for choice in groups()["algorithm"]:
        assert choice in message
    assert "algorithm=my_module:name" in message
    assert refusal("tools=[python,calculator]").endswith("tools=custom tools.use=[python,calculator]")


@pytest.mark.parametrize(
    ("argument", "parts"),
    [
        ("steps=two", ["steps", "'two'", "a whole number", "steps=1"]),
        ("steps=1.5", ["steps", "1.5", "a whole number"]),
        ("steps=true", ["steps", "True", "a whole number"]),
        ("steps=null", ["steps", "null", "a whole number"]),
        ("learner.lr=fast", ["learner.lr", "'fast'", "a number"]),
        ("learner.lr=nan", ["learner.lr", "nan", "finite"]),
        ("dry_run=1", ["dry_run", "1", "true or false"]),
        ("name=2024", ["name", "2024", "text", "'name=\"2024\"'"]),
        ("batch=4", ["batch", "4", "prompts, samples", "batch.<key>=<value>"]),
        ("correction_options=4", ["correction_options", "4", "correction_options.<option>=<value>"]),
    ],
)
def test_a_wrong_type_names_key_value_and_the_right_form(argument, parts):
    message = refusal(argument)
    for part in parts:
        assert part in message


@pytest.mark.parametrize(
    ("argument", "parts"),
    [
        ("task.path=/d (1).jsonl", ["task.path", "/d (1).jsonl", "'task.path=\"/d (1).jsonl\"'"]),
        ("nonsense", ["'nonsense'", "key=value"]),
        ("steps:3", ["'steps:3'", "key=value"]),
        ("--multirun", ["--multirun", "key=value"]),
        ("~steps", ["~steps", "cannot be removed"]),
        ("seed=1,2", ["seed", "1,2", "one value a run"]),
        ("rollout@x=vllm", ["rollout@x=vllm", "rollout=vllm"]),
        ("rollout={engines: 2}", ["rollout", "engines", "rollout.<key>=<value>"]),
        ("algorithm.name=grpo", ["algorithm.name", "'grpo'", "algorithm=grpo"]),
        ("algorithm=null", ["algorithm=null", "ctpo"]),
        ("reward=score.py:f", ["reward=score.py:f", "my_module:name"]),
        ("output=${oc.env:RLTK_NO_SUCH_VARIABLE}", ["RLTK_NO_SUCH_VARIABLE", "output"]),
    ],
)
def test_a_malformed_setting_is_refused_with_the_form_that_works(argument, parts):
    message = refusal(argument)
    for part in parts:
        assert part in message


def test_a_choice_that_needs_a_value_says_which():
    assert "task.path has no value: set task.path=" in refusal("task=jsonl")
    assert "model=<folder or Hub id>" in refusal("model=custom")
    assert "task=my_module:name" in refusal("task=custom")


@pytest.mark.parametrize(
    "argument",
    [
        "name=hf_" + "abcdefghij" * 4,
        "tracker.project=" + "0123456789abcdef0123" * 2,
        "tracker.api_key=whatever-it-is",
        "reward.openai_api_key='sk-abcdefghij0123456789(broken'",
        "task.system=sk-proj-abcdefghij0123456789",
    ],
)
def test_secrets_are_refused_and_never_shown(argument):
    message = refusal("reward=m:f", argument)
    assert "secrets come from the environment" in message
    assert argument.partition("=")[0] in message
    assert argument.partition("=")[2].strip("'") not in message


def test_a_value_taken_from_a_secret_of_the_environment_is_refused(monkeypatch):
    monkeypatch.setenv("MY_SERVICE_TOKEN", "correct-horse-battery-staple")
    message = refusal("name=${oc.env:MY_SERVICE_TOKEN}")
    assert message.startswith("name holds") and "horse" not in message


def test_keys_that_only_speak_of_tokens_are_no_secrets():
    config = load(["reward=m:f", "reward.pad_token='<|pad|>'", "reward.revision=" + "0123456789abcdef0123" * 2])
    assert config.reward.options["pad_token"] == "<|pad|>"


def test_the_converter_refuses_keys_that_an_experiment_file_made_up():
    with pytest.raises(ConfigError, match="rollout.enginez"):
        convert(Config, {"rollout": {"enginez": 2}})


# Words, entry point, documentation


def test_nearest_words():
    assert nearest("tsi", ["none", "tis"]) == "tis"
    assert nearest("xyz", ["none", "tis"]) is None
    assert nearest_key("minibatch", ["algorithm.minibatches", "batch.prompts"]) == "algorithm.minibatches"
    assert nearest_key("qqq", ["steps"]) is None


@pytest.mark.parametrize(
    ("error", "code", "said"),
    [
        (ConfigError("steps = 0 must be at least 1"), 2, "rltk: steps = 0 must be at least 1\n"),
        (KeyboardInterrupt(), 130, "rltk: interrupted\n"),
        (ValueError("deep inside"), 1, "Traceback"),
    ],
)
def test_an_entry_point_ends_with_the_code_that_tells_why(error, code, said, capsys):
    def main(argv):
        raise error

    with pytest.raises(SystemExit) as caught:
        run_entry(main)
    assert caught.value.code == code
    assert said in capsys.readouterr().err


def test_the_usage_text_lists_every_group_choice_and_main_key(default):
    text = usage()
    for group, choices in groups().items():
        assert re.search(rf"^  {group.replace('/', '.')} +{re.escape(' | '.join(choices))}$", text, re.MULTILINE)
    assert set(MAIN_KEYS) <= set(flatten(default))
    for key in MAIN_KEYS:
        assert f"  {key}=" in text


def test_every_key_is_documented(default):
    text = DOCS.read_text(encoding="utf-8")
    free = ("algorithm.", "task.")  # their options are told in their own files
    missing = [key for key in flatten(default) if not key.startswith(free) and f"`{key}`" not in text]
    assert missing == []
