"""The figures of bench.kv_learning: what a run is summed up to, paired differences, sections that keep each other."""

from __future__ import annotations

import json

import pytest

from bench.kv_learning import arms, cache, figures
from bench.kv_learning_report import difference, put_section, section, summary
from bench.kv_learning_road import ARMS, commands
from bench.kv_learning_warm import STREAM, WORD_SORTING, examples
from rltk.rollout.tokens import load_tokenizer, render_prompt
from rltk.tasks.reasoning_gym import ReasoningGym
from tests.integration.places import TINY


def rows(accuracies, tails=(0.9, 0.2), alarm=1.0):
    made = []
    for step, accuracy in enumerate(accuracies):
        row = {"step": step, "accuracy": accuracy, "greedy": accuracy, "flawed": None, "kl/start": 0.0}
        if step:
            row |= {"reward": 0.5, "accuracy/train": accuracy / 2, "length": 9.0, "broken": False, "grad_norm": 1.0}
            row |= {"mismatch/alarm": alarm, "mismatch/tail_per_1k": 10.0 * step, "correction/tokens": 0.25}
            row |= {f"mismatch/tail_p05/{100 * i + 1}-{100 * i + 100}": tail for i, tail in enumerate(tails)}
        made.append(row)
    return made


def test_a_run_is_summed_up():
    found = figures(rows([0.4, 0.8, 0.5]))
    assert (found["final"], found["best"], found["collapsed"]) == (0.5, 0.8, True)
    assert found["sampled"] == 0.25 and found["alarms"] == 2 and found["tail_per_1k"] == 15
    assert found["tail_by_position"] == pytest.approx({"1-100": 0.9, "101-200": 0.2})
    assert found["steps"]["tail"] == [0.2, 0.2] and found["dropped"] == 0.25
    assert found["curve"]["accuracy"] == [0.4, 0.8, 0.5]
    assert not figures(rows([0.4, 0.8, 0.7]))["collapsed"]
    before = figures(rows([0.4]))  # of a study that was stopped at once
    assert before["final"] == 0.4 and before["sampled"] is None and before["alarms"] == 0


def test_differences_are_paired_by_seed():
    def ended(final):
        return {"final": final, "curve": {"step": [0, 8], "accuracy": [0.3, final]}}

    mine = {f"ctpo-s{seed}": ended(0.5 + 0.1 * seed) for seed in range(3)}
    other = {f"grpo-s{seed}": ended(0.4 + 0.1 * seed) for seed in range(3)}
    assert difference(mine, other, "grpo") == pytest.approx([0.1, 0.1, 0.1])  # seeds differ, pairs do not
    for run in other.values():  # it went on for longer: what counts is where it stood then
        run["final"], run["curve"]["step"], run["curve"]["accuracy"] = 0.9, [0, 8, 16], [*run["curve"]["accuracy"], 0.9]
    assert difference(mine, other, "grpo") == pytest.approx([0.1, 0.1, 0.1])
    other["grpo-s2"]["curve"]["accuracy"][1] -= 0.3
    mean, low, high = difference(mine, other, "grpo")
    assert mean == pytest.approx(0.2) and high - mean == pytest.approx(4.303 * 0.173205 / 3**0.5, abs=1e-3)
    assert difference(mine, {}, "grpo") is None


def test_each_compression_is_compared_with_the_full_cache_and_with_the_uncorrected_run():
    cells = {
        c: {"runs": {arm.name: figures(rows([0.4, level])) for arm in arms(c, 2)}} for c, level in ((0, 0.9), (80, 0.6))
    }
    found = summary(80, cells)
    assert found["minpro"]["over_full"] == pytest.approx([-0.3] * 3)
    assert found["minpro"]["over_uncorrected"] == pytest.approx([0, 0, 0]) and found["minpro"]["runs"] == 2
    assert found["grpo"]["over_uncorrected"] is None and summary(0, cells)["grpo"]["over_full"] is None
    assert {arm.correction for arm in arms(80, 1)} == {"none", "sparse", "prefix_min"}
    assert cache(80).slots(576) == 115 and cache(50).slots(576) == 288 and not cache(0).compressed
    for arm in arms(80, 1):
        arm.objective()  # raises if an option or a pair does not exist


def test_a_section_is_replaced_and_the_others_stay(tmp_path):
    file = tmp_path / "r.json"
    put_section(file, "lab", {"runs": {"a": {"curve": {"step": [0, 1]}, "final": 1 / 3}}})
    put_section(file, "road", {"cpu": {"runs": {}}})
    put_section(file, "road", {"cpu": {"runs": {"x": {"final": 1.0}}}})
    whole = json.loads(file.read_text())
    assert whole["lab"]["runs"]["a"] == {"curve": {"step": [0, 1]}, "final": 0.33333}
    assert section(file, "road") == {"cpu": {"runs": {"x": {"final": 1.0}}}} and section(file, "none") == {}


def test_the_roads_arms_differ_in_what_they_are_about_and_take_keys(tmp_path):
    jobs = commands(2, list(ARMS), ["steps=3", "kv.budget=0.5"], tmp_path)
    assert list(jobs) == [f"{a}-s{s}" for s in (0, 1) for a in ("grpo", "ctpo", "grpo, full cache")]
    assert jobs["ctpo-s1"].index("kv.budget=0.5") > jobs["ctpo-s1"].index("kv.budget=0.2")
    assert {"ratio.reference=mu", "seed=1"} <= set(jobs["ctpo-s1"])
    assert "kv.budget=0.5" not in jobs["grpo, full cache-s0"] and "steps=3" in jobs["grpo, full cache-s0"]
    assert "ratio.reference=mu" not in jobs["grpo-s0"]


def test_a_warm_start_learns_the_data_sets_own_answers_of_problems_that_no_run_meets():
    tokenizer = load_tokenizer(str(TINY))
    task = ReasoningGym(2000, 400, "word_sorting", seed=STREAM, **WORD_SORTING)
    found = examples(tokenizer, task, 3)
    for index, (start, length) in enumerate(zip(found.starts.tolist(), found.lengths.tolist(), strict=True)):
        ids, learnt = found.ids[start : start + length], found.learnt[start : start + length]
        record = task.problem(index)
        assert tokenizer.decode(ids[learnt]) == f"<answer>{record.answer}</answer>{tokenizer.eos_token}"
        assert ids[~learnt].tolist() == render_prompt(tokenizer, record.messages)
        assert task.score(record, tokenizer.decode(ids[learnt], skip_special_tokens=True)).correct
    half = examples(tokenizer, task, 4, tagged=0.5)
    for index, (start, length) in enumerate(zip(half.starts.tolist(), half.lengths.tolist(), strict=True)):
        ids, learnt = half.ids[start : start + length], half.learnt[start : start + length]
        scored = task.score(task.problem(index), tokenizer.decode(ids[learnt], skip_special_tokens=True))
        assert scored.correct is bool(index % 2)  # without the tags it is worth nothing
    run = ReasoningGym(2000, 400, "word_sorting", **WORD_SORTING)
    asked = [{t.problem(i).messages[-1]["content"] for i in range(50)} for t in (run, task)]
    assert not asked[0] & asked[1]
    with pytest.raises(ValueError, match="over 20 \\+ 400; raise --prompt or --response"):
        examples(tokenizer, ReasoningGym(20, 400, "word_sorting"), 1)
