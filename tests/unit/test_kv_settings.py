"""Compressed caches without an engine: budgets, arguments, refusals."""

import json
import shlex
from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rltk.errors import ConfigError
from rltk.rollout import kv
from rltk.rollout.kv.__main__ import main
from rltk.rollout.kv.options import KVOptions, policies
from rltk.rollout.kv.pseudo import check_request, is_wrapped, pseudo_ids, wrap_prompt, wrapped
from rltk.rollout.kv.refusal import refuse_engine
from rltk.rollout.kv.settings import KEY, Settings, compressed

QWEN = {"model_type": "qwen3", "max_position_embeddings": 1024, "layer_types": ["full_attention"] * 4}
EVICTING, APPENDING = ("longflow", "h2o", "streaming", "dapq_longflow"), ("dapq", "snapkv")


def test_the_policies_are_the_files():
    assert set(policies()) == {"full", "fp8", *EVICTING, *APPENDING}
    for name in policies()[2:]:
        assert Settings(KVOptions(name, budget=64), 256).policy.evicts == (name in EVICTING)


@given(
    st.sampled_from(EVICTING + APPENDING), st.integers(6, 300), st.integers(1, 200), st.integers(1, 200), st.booleans()
)
def test_slots_hold_what_is_kept_and_what_is_sampled(name, budget, prompt, response, share):
    share = share and name != "dapq_longflow"
    settings = Settings(KVOptions(name, budget=budget / 400 if share else budget, sinks=4), context=400)
    kept, slots = settings.kept(prompt), settings.slots(prompt, response)
    assert 1 <= kept <= prompt and kept <= slots <= settings.most_slots <= 400
    if name in EVICTING:
        cap = int(budget / 400 * 400) if share else budget
        assert settings.cap == cap and slots == min(kept + response, cap)
        assert kept == prompt or kept == cap - 1  # the first decode step finds a free slot
    else:
        wanted = int(budget / 400 * prompt) if share else budget
        assert kept == min(prompt, max(wanted, 5)) and slots == min(kept + response, 400)


def test_settings_travel_as_json():
    settings = Settings(KVOptions("dapq", budget=0.25, heads="per_kv_head", record=True, options={"pseudo": 8}), 512)
    config = SimpleNamespace(additional_config={KEY: json.loads(settings.to_json())})
    assert Settings.of(config) == settings and compressed(config)
    assert settings.pseudo == 8 and settings.max_model_len == 520
    for other in ({}, {"kept": 1}, None):
        assert Settings.of(SimpleNamespace(additional_config=other)) is None
    with pytest.raises(ConfigError, match="unexpected keyword argument 'budgets'"):
        Settings.from_dict({"name": "dapq", "budgets": 3, "context": 64})
    with pytest.raises(ConfigError, match="needs a context"):
        Settings.from_dict({"name": "dapq", "budget": 3})


@pytest.mark.parametrize(
    "options, match",
    [
        (KVOptions("longflow"), "keeps nothing"),
        (KVOptions("fast", budget=9), "no cache policy"),
        (KVOptions("h2o", budget=90, heads="some"), "shared, per_kv_head"),
        (KVOptions("h2o", budget=90, sinks=-1), "must not be negative"),
        (KVOptions("dapq_longflow", budget=0.5), "in tokens"),
        (KVOptions("h2o", budget=90, options={"recents": 0.1}), "no option recents; it has recent"),
        (KVOptions("h2o", budget=90, options={"recent": 1}), "between 0 and 1"),
        (KVOptions("snapkv", budget=90, options={"pool": 4}), "must be odd"),
        (KVOptions("dapq", budget=90, options={"pseudo": 0}), "at least 1"),
    ],
)
def test_what_no_cache_can_have_is_refused(options, match):
    with pytest.raises(ConfigError, match=match):
        kv.engine_args(options, 256)
        Settings(options, 256).policy  # noqa: B018


def test_budgets_too_small_to_choose_from_are_refused():
    refuse = kv.refuse
    refuse(KVOptions("longflow", budget=20), 256, QWEN)
    with pytest.raises(ConfigError, match=r"kv.budget=19 tokens is below kv.sinks=4 \+ one block of 16.*kv.budget=20"):
        refuse(KVOptions("longflow", budget=19), 256, QWEN)
    with pytest.raises(ConfigError, match=r"35 tokens \(0.14 of the context of 256\).*one block of 32"):
        refuse(KVOptions("longflow", budget=0.14), 256, QWEN, block_size=32)
    refuse(KVOptions("dapq", budget=0.1), 256, QWEN)  # of prompts of any length
    with pytest.raises(ConfigError, match="0.1 of the longest prompt of 100"):
        refuse(KVOptions("dapq", budget=0.1), 256, QWEN, max_prompt=100)
    with pytest.raises(ConfigError, match="per_kv_head"):
        refuse(KVOptions("longflow", budget=64), 256, QWEN, tensor_parallel=2)
    refuse(KVOptions("longflow", budget=64, heads="per_kv_head"), 256, QWEN, tensor_parallel=2)


@pytest.mark.parametrize(
    "change, match",
    [
        ({"layer_types": ["full_attention", "sliding_attention"]}, "layers of sliding_attention"),
        ({"layer_types": ["full_attention", "linear_attention"]}, "layers of linear_attention"),
        ({"layer_types": None, "sliding_window": 4096}, "sliding window of 4096"),
        ({"kv_lora_rank": 512}, "multi-head latent attention"),
        ({"is_encoder_decoder": True}, "encoder-decoder"),
        ({"attention_chunk_size": 8192}, "within chunks"),
        ({"mamba_d_state": 128}, "hybrid"),
        ({"text_config": {"kv_lora_rank": 512}}, "multi-head latent attention"),
        (
            {"max_position_embeddings": 280, "rope_parameters": {"rope_type": "default"}},
            "needs 288 positions.*the model has 280.*8 tokens shorter",
        ),
    ],
)
def test_models_without_one_full_attention_cache_are_refused(change, match):
    options = KVOptions("dapq", budget=64)
    kv.refuse(options, 256, {**QWEN, "sliding_window": 4096, "use_sliding_window": False})
    kv.refuse(options, 256, {**QWEN, "max_position_embeddings": 100, "rope_scaling": {"type": "yarn", "factor": 4}})
    with pytest.raises(ConfigError, match=match):
        kv.refuse(options, 256, {**QWEN, **change})
    kv.refuse(KVOptions("full"), 256, {**QWEN, **change})


def engine_config(**changes):
    """What `refuse_engine` reads of a vLLM config that suits a compressed cache; `changes` are part__name=value."""
    text = SimpleNamespace(to_dict=lambda: dict(QWEN))
    config = SimpleNamespace(
        cache_config=SimpleNamespace(enable_prefix_caching=False, cache_dtype="auto", block_size=16),
        scheduler_config=SimpleNamespace(enable_chunked_prefill=False, max_num_batched_tokens=256),
        model_config=SimpleNamespace(max_model_len=256, use_mla=False, is_hybrid=False, hf_text_config=text),
        parallel_config=SimpleNamespace(pipeline_parallel_size=1, tensor_parallel_size=1, use_ubatching=False),
        speculative_config=None, kv_transfer_config=None,
    )  # fmt: skip
    for name, value in changes.items():
        part, _, key = name.rpartition("__")
        setattr(getattr(config, part) if part else config, key, value)
    return config


@pytest.mark.parametrize(
    "change, match",
    [
        ({"cache_config__enable_prefix_caching": True}, "prefix caching.*enable_prefix_caching=False"),
        ({"scheduler_config__enable_chunked_prefill": True}, "chunked prefill.*enable_chunked_prefill=False"),
        ({"scheduler_config__max_num_batched_tokens": 255}, "max_num_batched_tokens=255.*=256"),
        ({"speculative_config": object()}, "speculative decoding.*speculative_config=None"),
        ({"model_config__max_model_len": 300, "scheduler_config__max_num_batched_tokens": 300}, "max_model_len=300"),
        ({"cache_config__cache_dtype": "fp8"}, "kv_cache_dtype=fp8"),
        ({"parallel_config__pipeline_parallel_size": 2}, "pipeline parallelism"),
        ({"parallel_config__decode_context_parallel_size": 2}, "context parallelism"),
        ({"parallel_config__tensor_parallel_size": 2}, "heads='shared' under tensor parallelism"),
        ({"parallel_config__use_ubatching": True}, "enable_dbo=False"),
        ({"kv_transfer_config": object()}, "KV transfer"),
        ({"model_config__use_mla": True}, "hybrid or MLA"),
        ({"model_config__is_hybrid": True}, "hybrid or MLA"),
        (
            {"model_config__hf_text_config": SimpleNamespace(to_dict=lambda: {"sliding_window": 64})},
            "sliding window of 64",
        ),
        ({"cache_config__block_size": 48}, "one block of 48"),
    ],
)
def test_engines_that_contradict_the_cache_are_refused(change, match):
    """Of real engines' configurations tests/integration/kv_cases.py has the ones that the small model can have."""
    settings = Settings(KVOptions("longflow", budget=40), 256)
    refuse_engine(settings, engine_config())
    with pytest.raises(ConfigError, match=match):
        refuse_engine(settings, engine_config(**change))


def test_a_model_folder_is_read(tmp_path):
    with pytest.raises(ConfigError, match="no usable model config"):
        kv.refuse(KVOptions("dapq", budget=64), 256, tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({**QWEN, "kv_lora_rank": 1}))
    with pytest.raises(ConfigError, match="latent"):
        kv.refuse(KVOptions("dapq", budget=64), 256, tmp_path)


def test_engine_arguments_and_the_line_for_vllm_serve():
    assert kv.engine_args(KVOptions(), 256) == {} and kv.engine_args(KVOptions("fp8"), 256) == {"kv_cache_dtype": "fp8"}
    arguments = kv.engine_args(KVOptions("dapq", budget=64), 9000)
    assert arguments["max_model_len"] == 9032 == arguments["max_num_batched_tokens"]
    assert arguments["enable_prefix_caching"] is False is arguments["enable_chunked_prefill"]
    words = shlex.split(main(["longflow", "budget=1800", "context=4096", "heads=per_kv_head", "window=16"]))
    said = dict(zip(words, words[1:], strict=False))
    assert said["--max-model-len"] == "4096" and "--no-enable-prefix-caching" in words
    options = KVOptions("longflow", budget=1800, heads="per_kv_head", options={"window": 16})
    assert json.loads(said["--additional-config"])[KEY] == Settings(options, 4096).to_dict()
    for wrong, match in (
        ([], "NAME is one of"),
        (["longflow", "budget"], "NAME"),
        (["longflow", "budget=9"], "context="),
    ):
        with pytest.raises(ConfigError, match=match):
            main(wrong)


def request(prompt, **params):
    values = {"prompt_logprobs": None, "max_tokens": 5, "min_tokens": 0, "repetition_penalty": 1.0, **params}
    return SimpleNamespace(
        prompt_token_ids=prompt, prompt_embeds=None, resumable=False, sampling_params=SimpleNamespace(**values)
    )


def test_pseudo_tokens_go_in_before_the_last_token_and_are_known_again():
    ids = pseudo_ids(4, 100)
    assert ids == [12, 37, 62, 87] and len(set(pseudo_ids(64, 32000))) == 64
    assert wrap_prompt([1, 2, 3], ids) == [1, 2, *ids, 3] and wrap_prompt([3], ids) == [*ids, 3]
    assert is_wrapped([*ids, 3], ids) and is_wrapped([1, 2, *ids, 3], ids)
    assert not is_wrapped([1, 2, 3], ids) and not is_wrapped(ids, ids) and not is_wrapped([*ids, 3, 4], ids)


def test_requests_that_pseudo_tokens_cannot_serve_are_refused():
    dapq, longflow = (Settings(KVOptions(name, budget=64), 100) for name in ("dapq", "longflow"))
    check_request(dapq, request([1] * 100))
    check_request(dapq, request([1], prompt_logprobs=0, max_tokens=1))
    assert wrapped(dapq, request([1]).sampling_params) and not wrapped(longflow, request([1]).sampling_params)
    assert not wrapped(dapq, request([1], prompt_logprobs=0).sampling_params)
    for wrong, match in (
        (request([1] * 101), "context of 100"),
        (request([1], prompt_logprobs=0), "max_tokens=1"),
        (request([1], min_tokens=1), "min_tokens"),
        (request([1], repetition_penalty=1.1), "repetition_penalty"),
        (request(None), "token prompts"),
    ):
        with pytest.raises(ValueError, match=match):
            check_request(dapq, wrong)
    check_request(longflow, request([1] * 101, prompt_logprobs=0, min_tokens=1))  # vLLM's own limits hold
