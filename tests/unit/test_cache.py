"""kv=<policy>: what is composed, refused and warned of before a run, what its plan says, and who may resume it."""

from __future__ import annotations

import inspect
import json
import math
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rltk import doctor, manifest
from rltk.checks import check
from rltk.compose import groups, load
from rltk.config import Config
from rltk.errors import ConfigError
from rltk.kv_size import cache_size, context, most_kept
from rltk.model_folder import resolve_model
from rltk.plan import make_plan
from rltk.plan_view import WIDTH, render
from rltk.rollout.kv.options import KVOptions, policies
from rltk.rollout.kv.policies.policy import build_policy
from tests.unit.checking import changed, refusal

LONG = {"task.max_response_tokens": 512, "task.max_prompt_tokens": 64}
CORRECTED = {"ratio.reference": "mu"}


@pytest.fixture
def long(base) -> Config:
    """A run of sequences long enough to compress, which corrects for its sampler."""
    return changed(base, LONG | CORRECTED)


def with_kv(config: Config, name: str, size: float = 0.2, **fields) -> Config:
    return replace(config, kv=KVOptions(name, size, **fields))


# The command line


def test_every_policy_has_a_choice_and_every_choice_a_policy():
    assert set(groups()["kv"]) == set(policies())


def test_a_policys_keys_and_its_own_options_reach_the_config():
    kv = load(["kv=longflow", "kv.budget=1800", "kv.heads=per_kv_head", "kv.sinks=8"]).kv
    assert (kv.name, kv.budget, kv.heads, kv.sinks, kv.record) == ("longflow", 1800.0, "per_kv_head", 8, False)
    assert load(["kv=longflow"]).kv.budget == 0.2


@pytest.mark.parametrize("name", [name for name in policies() if KVOptions(name).compressed])
def test_the_file_of_a_policy_lists_its_options_with_their_defaults(name):
    options = load([f"kv={name}", "kv.budget=64"]).kv.options
    parameters = inspect.signature(type(build_policy(name, options))).parameters
    assert options == {key: parameter.default for key, parameter in parameters.items()}


def test_dapq_longflow_asks_for_its_budget():
    with pytest.raises(ConfigError, match=r"kv.budget has no value: set kv.budget="):
        load(["kv=dapq_longflow"])
    assert load(["kv=dapq_longflow", "kv.budget=512"]).kv.slots(99) == 512


def test_a_key_of_another_policy_is_unknown():
    with pytest.raises(ConfigError, match=r"unknown key kv.heads .*kv.name, kv.budget"):
        load(["kv.heads=shared"])
    with pytest.raises(ConfigError, match=r"kv=longflo is not known \(did you mean longflow\?"):
        load(["kv=longflo"])


# What is refused


CASES = [
    (KVOptions("full", 0.2), ["kv.budget = 0.2", "kv=full", "keeps every token", "kv=longflow kv.budget=0.2"]),
    (KVOptions("fp8", 64), ["kv.budget = 64", "kv=fp8", "leave it out"]),
    (KVOptions("fp8"), ["kv=fp8", "on a CPU", "kv=full"]),
    (KVOptions("longflow"), ["kv=longflow has no budget", "kv.budget="]),
    (KVOptions("longflow", -1), ["kv.budget = -1", "at least 0"]),
    (KVOptions("longflow", 64.5), ["kv.budget = 64.5", "whole tokens", "kv.budget=64"]),
    (KVOptions("longflow", 0.05), ["kv.budget=28 tokens (0.05 of the context of 577)", "block of 32", "kv.budget=36"]),
    (KVOptions("streaming", 40, sinks=16), ["kv.budget=40 tokens is below kv.sinks=16 + one block", "kv.budget=48"]),
    (KVOptions("snapkv", 0.2), ["kv.budget=12 tokens (0.2 of the longest prompt of 64)", "kv.budget=36"]),
    (KVOptions("dapq_longflow", 0.2), ["kv.budget=0.2 is a share", "kv.budget in tokens"]),
    (KVOptions("h2o", 0.2, heads="per_head"), ["kv.heads = 'per_head'", "did you mean per_kv_head?", "shared"]),
    (KVOptions("h2o", 0.2, sinks=-1), ["kv.sinks = -1", "at least 0"]),
    (KVOptions("h2o", 0.2, options={"recent": 1}), ["recent=1", "between 0 and 1"]),
    (KVOptions("longflw", 0.2), ["kv=longflw is not known", "did you mean longflow?", "snapkv"]),
]  # fmt: skip


@pytest.mark.parametrize(("kv", "parts"), CASES, ids=lambda case: case.name if isinstance(case, KVOptions) else "")
def test_a_cache_that_cannot_start_is_refused_with_the_fix(long, kv, parts):
    message = refusal(replace(long, kv=kv))
    for part in parts:
        assert part in message


def test_the_fix_that_is_named_is_one(long):
    assert check(with_kv(long, "longflow", 36)) == check(with_kv(long, "streaming", 48, sinks=16)) == []


@pytest.mark.parametrize(
    ("written", "part"),
    [
        ({"layer_types": ["sliding_attention"] * 4}, "layers of sliding_attention"),
        ({"layer_types": None, "sliding_window": 4096, "use_sliding_window": True}, "sliding window of 4096"),
        ({"kv_lora_rank": 512}, "latent attention"),
        ({"layer_types": ["linear_attention", "full_attention"] * 2}, "layers of linear_attention"),
    ],
)
def test_a_model_of_another_attention_is_refused_by_its_own_file(long, tmp_path, written, part):
    folder = tmp_path / "model"
    shutil.copytree(long.model.path, folder)
    found = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(found | written))
    other = changed(long, {"model.path": str(folder)})
    message = refusal(with_kv(other, "longflow"))
    assert part in message and "kv=full" in message
    assert check(other) == []


# What is warned of


def test_a_policy_that_never_evicts_anything_is_called_so(long):
    (warning,) = check(with_kv(long, "longflow", 600))
    assert "kv.budget = 600 is not under task.max_prompt_tokens + task.max_response_tokens = 576" in warning
    (warning,) = check(with_kv(long, "snapkv", 64))
    assert "is not under task.max_prompt_tokens = 64: nothing is ever compressed" in warning


def test_samples_of_another_policy_want_a_correction(long):
    naive = changed(long, {"ratio.reference": "old"})
    (warning,) = check(with_kv(naive, "longflow"))
    for part in ("kv=longflow", "correction = 'none'", "collapse", "ratio.reference=mu", "sparse or prefix_min"):
        assert part in warning
    assert check(with_kv(replace(naive, correction="sparse"), "longflow")) == []
    assert check(with_kv(changed(naive, {"algorithm.name": "minirl"}), "longflow")) == []
    assert check(with_kv(naive, "longflow"), training=False) == []
    assert check(naive) == []


# Arithmetic


@pytest.fixture(scope="module")
def packaged() -> Config:
    return resolve_model(load(["cluster.device=cpu"]))


@settings(max_examples=60, deadline=None)
@given(st.sampled_from(["full", "longflow", "snapkv"]), st.integers(36, 400), st.integers(1, 300), st.integers(1, 600))
def test_a_sequence_takes_the_blocks_of_what_it_keeps(packaged, name, tokens, prompt, response):
    config = replace(packaged, kv=KVOptions(name, 0 if name == "full" else tokens))
    config = changed(config, {"task.max_prompt_tokens": prompt, "task.max_response_tokens": response})
    size = cache_size(config)
    assert size.slots <= size.tokens == prompt + response
    kept = {"full": prompt, "longflow": min(prompt, tokens - response), "snapkv": min(prompt, tokens)}
    assert size.slots == kept[name] + response
    assert (size.blocks - 1) * 32 < size.slots <= size.blocks * 32
    room = size.gib(7)
    assert room is not None and size.held(room * (1 + 1e-12)) == 7


def test_a_share_is_of_the_prompt_or_of_the_engines_longest_sequence(long):
    assert context(long) == 64 + 512 + 1
    assert most_kept(with_kv(long, "longflow", 0.2)) == math.floor(0.2 * 577)
    assert most_kept(with_kv(long, "dapq", 0.75)) == 48


def test_the_plan_shows_what_is_kept_and_how_many_more_fit(long):
    config = with_kv(long, "longflow")
    text = render(make_plan(config), check(config))
    assert max(len(line) for line in text.splitlines()) <= WIDTH
    said = " ".join(text.split())
    # 115 slots are 4 blocks, 576 tokens 18; a token is 2 * 4 layers * 2 heads * 32 numbers of 4 bytes
    assert "longflow, 115 slots a sequence of up to 576 tokens (0.2 of it), heads shared, 4 sinks" in said
    assert "4 blocks, 256 KiB; 18 in full, so 4.5 x the sequences" in said
    assert "1 GiB, holds 4,095 sequences of full length" in said  # 16 384 blocks, one of which vLLM keeps
    assert "full: 18 blocks, 1.12 MiB" in " ".join(render(make_plan(long)).split())


def test_what_a_small_cache_does_to_a_compressed_run_is_told(long):
    small = changed(with_kv(long, "longflow"), {"rollout.kv_cache_gib": 0.02})
    (warning,) = check(small)
    assert "81 run at once and the rest wait" in warning and "rollout.kv_cache_gib=0.07" in warning
    assert check(changed(small, {"rollout.kv_cache_gib": 0.07})) == []


# Resume


def test_another_cache_is_another_run(long):
    made = manifest.make_manifest(with_kv(long, "longflow"))
    refused, _ = manifest.compare(made, manifest.make_manifest(with_kv(long, "longflow", 0.5)))
    assert refused == ["kv.budget: 0.2 -> 0.5"]
    refused, _ = manifest.compare(made, manifest.make_manifest(long))
    assert "kv.name: 'longflow' -> 'full'" in refused
    recorded = manifest.make_manifest(with_kv(long, "longflow", record=True))
    assert manifest.compare(made, recorded)[0] == []


def test_the_doctor_tells_when_vllm_will_not_load_the_plugin(monkeypatch):
    monkeypatch.delenv("VLLM_PLUGINS", raising=False)
    assert doctor._cache_plugin().status == "ok"
    monkeypatch.setenv("VLLM_PLUGINS", "another")
    assert doctor._cache_plugin().fix == "add rltk_kv to it"
    monkeypatch.setattr("rltk.doctor.metadata.entry_points", lambda group: ())
    assert "install rltk again" in doctor._cache_plugin().fix


def test_the_documentation_names_every_policy():
    text = (Path(__file__).parents[2] / "docs" / "kv.md").read_text(encoding="utf-8")
    assert [name for name in policies() if f"`{name}`" not in text] == []
