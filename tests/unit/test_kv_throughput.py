"""The arithmetic of bench.kv_throughput: who is admitted when, what fits the pool, what is predicted and quoted."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import bench.kv_throughput
from bench.kv_throughput import figures, rows
from bench.kv_throughput_plan import H200, SMOKE, Arm, Batch, admitted, largest_batch, predict
from rltk.errors import ConfigError

POOL = 118 << 30
KERNEL = json.loads((Path(bench.kv_throughput.__file__).parent / "results" / "longflow_kernel.json").read_text())


@pytest.mark.parametrize("scale", [H200, SMOKE])
def test_parameters_are_the_models_own_but_for_embedding_and_norms(scale):
    from transformers import Qwen3Config, Qwen3ForCausalLM

    with torch.device("meta"):
        model = Qwen3ForCausalLM(Qwen3Config(**scale.shape.config()))
    read = [p.numel() for name, p in model.named_parameters() if "norm" not in name and "embed" not in name]
    assert sum(read) == scale.shape.parameters


def test_stationary_prompts_are_spread_evenly_whatever_their_number():
    for count in (1, 64, 605):
        lengths = H200.lengths("stationary", count)
        assert lengths == sorted(lengths, reverse=True) and lengths[-1] >= 512 and lengths[0] <= 16896
        assert sum(lengths) / count == pytest.approx((512 + 16896) / 2, abs=1)
    assert H200.lengths("group_end", 3) == [16384] * 3


def test_admission_counts_running_sequences_and_splits_prompts_only_where_it_may():
    assert admitted([6, 6, 6], 12, chunked=False) == [1, 1, 2]
    assert admitted([6, 6, 6], 10, chunked=False) == [1, 2, 3]
    assert admitted([6, 6, 7], 10, chunked=True) == [1, 2, 2]  # 6 + 4; one token decoded + 2 + 7
    assert admitted([6, 6, 8], 10, chunked=True) == [1, 2, 3]
    with pytest.raises(ValueError, match="finds no room"):
        admitted([6, 6], 6, chunked=False)  # the first one decodes in the second step
    with pytest.raises(ValueError, match="finds no room"):
        admitted([1, 1, 1], 1, chunked=True)


@given(st.lists(st.integers(1, 40), min_size=1, max_size=30), st.integers(75, 200), st.booleans())
def test_admission_keeps_the_order_and_the_budget_of_every_step(prompts, budget, chunked):
    done = admitted(prompts, budget, chunked)
    assert done == sorted(done) and done[0] >= 1 and len(done) == len(prompts)
    computed = sum(prompts) + sum(done[-1] - step for step in done)  # prompts, and what they decode meanwhile
    assert computed <= budget * done[-1]
    if not chunked:
        for step in set(done):
            whole = sum(p for p, at in zip(prompts, done, strict=True) if at == step)
            assert whole + sum(at < step for at in done) <= budget


@pytest.mark.parametrize("mix", ["stationary", "group_end"])
@pytest.mark.parametrize("name", ["full", "fp8", "longflow:1800", "longflow:3200", "snapkv:1800"])
def test_the_largest_batch_fits_and_no_larger_one_does(mix, name):
    arm = Arm(name, H200)
    batch = largest_batch(arm, mix, POOL)
    count, usable = len(batch.prompts), arm.usable_blocks(POOL)
    assert batch.blocks(arm) <= usable < Batch.of(arm, mix, count + 1).blocks(arm)
    assert max(p + most for p, most in zip(batch.prompts, batch.responses, strict=True)) <= H200.context
    # Little is wasted, or kept for what is sampled after the middle of the timed steps.
    assert 0.85 * usable * arm.block_size < batch.slots(arm) <= usable * arm.block_size


def test_sequences_of_each_cache_by_hand():
    slots = POOL // (28 * 8 * 2 * 128 * 2)
    counts = {name: len(largest_batch(Arm(name, H200), "group_end", POOL).prompts) for name in ("full", "fp8")}
    assert counts["full"] == pytest.approx(slots / (16384 + 300), abs=1)
    assert counts["fp8"] == pytest.approx(2 * slots / (16384 + 300), abs=1)
    compressed = largest_batch(Arm("longflow:1800", H200), "group_end", POOL)
    assert len(compressed.prompts) == (slots // 64 - 1) // 29
    assert compressed.slots(Arm("longflow:1800", H200)) == 1800 * len(compressed.prompts)


def test_a_pool_too_small_for_one_sequence_is_refused():
    with pytest.raises(ConfigError, match="do not hold one sequence"):
        largest_batch(Arm("full", H200), "group_end", 1 << 30)


@pytest.mark.parametrize("name", ["", ":5", "longflow:x", "longflow", "nothing:5", "full:5"])
def test_arms_that_name_no_cache_are_refused(name):
    with pytest.raises(ConfigError):
        _ = Arm(name, H200).settings


def test_attention_is_predicted_as_the_kernels_were_measured():
    cells = KERNEL["figures"]["cells"]
    for name, measured in (("full", "fa3"), ("longflow:1800", "shared")):
        for cell in cells:
            found = predict(Arm(name, H200), cell["batch"], cell["batch"] * cell["slots"], KERNEL["figures"])
            assert found.attention == pytest.approx(28e-6 * cell["us"][measured], rel=0.05)
            assert found.step == found.attention + found.weights + found.rest
    full, fp8 = (predict(Arm(name, H200), 64, 10**6, KERNEL["figures"]) for name in ("full", "fp8"))
    assert fp8.attention == pytest.approx(full.attention / 2, rel=0.02)
    few, many = (predict(Arm("full", H200), rows, 10**6, KERNEL["figures"]) for rows in (1, 1000))
    assert few.weights == pytest.approx(2 * H200.shape.parameters / (1e9 * KERNEL["figures"]["copy_gb_per_s"]))
    assert many.weights > 4 * few.weights  # multiplying takes longer than reading


def arm(name, mix="stationary", small=100.0, largest=200.0, sequences=10):
    predicted = {"tokens_per_s": 400.0 * sequences, "attention_ms": 1.0, "step_ms": 2.0}
    batch = {"preemptions": 1, "predicted": predicted, "over_predicted": 1.1, "mean_slots": 7.0, "step_ms": 2.2,
             "prefill_s": 3.0}  # fmt: skip
    batches = {"small": {**batch, "sequences": 4, "tokens_per_s": small}}
    if largest:
        batches["largest"] = {**batch, "sequences": sequences, "tokens_per_s": largest, "spent": {"attention_ms": 1.2}}
    return {"arm": name, "mix": mix, "cap": None, "batches": batches}


def command(*arms, mix="stationary"):
    return {"mix": mix, "command": "", "arms": {found["arm"]: found for found in arms}}


def test_ratios_are_to_the_first_arm_of_the_same_command():
    found = figures({
        "a": command(arm("full"), arm("longflow:1800", small=300.0, largest=800.0, sequences=50)),
        "b": command(arm("full", largest=100.0), arm("longflow:3200", largest=250.0, sequences=30), arm("fp8")),
        "c": command(arm("full"), arm("longflow:1800", largest=1400.0), mix="group_end"),
    })  # fmt: skip
    assert found["speedup_budget_1800"] == 4 and found["speedup_budget_3200"] == 2.5
    assert found["speedup_group_end"] == 7 and found["speedup_fp8"] == 2 and found["speedup_over_fp8"] == 2
    assert found["concurrency_over_full"] == {
        "longflow:1800": 5, "longflow:3200": 3, "fp8": 1, "group_end longflow:1800": 1,
    }  # fmt: skip
    assert found["predicted_speedup"]["longflow:1800"] == 5
    assert found["speedup_small_batch"]["longflow:1800"] == 3
    assert found["preemptions"] == 2 * 7


def test_an_arm_that_was_cut_gives_no_ratio():
    found = figures({"a": command(arm("full"), arm("longflow:1800", largest=None))})
    assert "speedup_budget_1800" not in found and found["concurrency_over_full"] == {}
    assert found["speedup_small_batch"] == {"longflow:1800": 1}
    assert figures({"a": command(arm("full"))})["preemptions"] == 2


def test_the_table_names_what_was_predicted_profiled_and_capped():
    cut = {**arm("longflow:1800", largest=800.0), "cap": "fewer ran"}
    text = "\n".join(rows(command(arm("full"), cut)))
    assert "4.00" in text and "+10%" in text and "fewer ran" in text
    assert "predicted ms: attention 1.00" in text and "profiled ms: attention 1.20" in text


def test_the_first_prompt_in_has_sampled_in_every_step_since():
    halved = replace(H200, batched_tokens=H200.batched_tokens // 2)
    wide, narrow = (Batch.of(Arm("longflow:1800", scale), "group_end", 64) for scale in (H200, halved))
    assert (wide.prefill_steps, narrow.prefill_steps) == (32, 64)  # two prompts a step, and one
    assert wide.drift[:4] == [32, 32, 31, 31] and wide.drift[-1] == 1
    assert {most - sampled for most, sampled in zip(wide.responses, wide.drift, strict=True)} == {256 + 32}
