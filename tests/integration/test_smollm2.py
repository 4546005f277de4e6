"""A real model on a real data set, from the command line."""

import json

import pytest

from tests.integration.test_road import allow, rows, run


@pytest.mark.full
@allow(1)
def test_smollm2_trains_a_step_on_a_reasoning_gym_task(tmp_path):
    code, out = run(
        "model=smollm2", "task=reasoning_gym", "task.dataset=chain_sum", "task.options.max_terms=2",
        "task.options.max_digits=1", "task.max_prompt_tokens=128", "task.max_response_tokens=24", "batch.prompts=2",
        "batch.samples=2", "algorithm.minibatches=2", "evaluation.problems=2", "evaluation.samples=1",
        "evaluation.greedy=false", "steps=1", "tracker=none",
        "learner.threads=1", "rollout.threads=1", f"output={tmp_path}", "name=real",
    )  # fmt: skip
    assert code == 0, out
    summary = json.loads((tmp_path / "real" / "summary.json").read_text())
    assert (summary["status"], summary["model"], summary["task"]) == ("finished", "smollm2", "reasoning_gym")
    assert summary["tokens_trained"] > 0 and len(rows(tmp_path / "real")) == 1
    samples = [json.loads(line) for line in (tmp_path / "real" / "samples.jsonl").read_text().splitlines()]
    assert samples and all("arithmetic problem" in str(sample) for sample in samples)
