"""Training with a compressed KV cache, as a user starts it: real engines, learner and weights, on CPU."""

import json
import multiprocessing
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.integration.places import TINY
from tests.integration.test_road import allow, rows, run

REWARD = "def score(trajectory, record):\n    return float(len(trajectory.text) % 2)\n"  # teaches, whatever is said
SMALL = ["experiment=smoke", "tracker=none", "reward=my_reward:score"]
# An engine of 48 + 140 + 1 tokens, of which 20 % are 37 slots, 2 of 6 blocks. Prompts of some 25 tokens.
SHORT = [*SMALL, "task.levels=[3,4]", "task.max_response_tokens=140"]
# 41 prompt tokens: the least that prompts can be compressed to is 36.
LONG = [*SMALL, "task=arithmetic_long", "task.max_response_tokens=96", "correction=prefix_min"]
POLICIES = {"dapq": 36, "snapkv": 36, "streaming": 40, "h2o": 40, "dapq_longflow": 40}


def trained(tmp_path: Path, *arguments: str) -> tuple[Path, dict, str]:
    """(its folder, summary, output) of a run that finished and moved its weights."""
    (tmp_path / "my_reward.py").write_text(REWARD)
    code, out = run(*arguments, f"output={tmp_path}", "name=run", path=tmp_path)
    assert code == 0, out
    folder = tmp_path / "run"
    summary = json.loads((folder / "summary.json").read_text())
    assert (summary["status"], summary["steps"], summary["weight_version"]) == ("finished", 2, [0, 2])
    before, after = (load_file(path / "model.safetensors") for path in (TINY, folder / "model"))
    assert any(not torch.equal(before[name].float(), tensor.float()) for name, tensor in after.items())
    for row in rows(folder):
        assert row["grad_norm"] > 0 and row["probe/max"] < 1e-4  # the probe reads no cache: engine and learner agree
        parts = [row[f"mismatch/mean/{cause}"] for cause in ("precision", "cache", "staleness")]
        assert sum(parts) == pytest.approx(row["mismatch/mean"], rel=1e-6) and parts[2] == 0
        assert 0 < row["mismatch/tail_p05/1-1000"] < 1 and row["mismatch/tail_per_1k"] >= 0
    return folder, summary, out


@pytest.mark.full  # a run with a compressed cache is a part of test_everything.py too
@allow(1)
def test_longflow_at_80_percent_trains_and_its_pool_is_compressed(tmp_path):
    folder, summary, out = trained(tmp_path, *SHORT, "kv=longflow", "ratio.reference=mu")
    assert (summary["kv"], summary["kv_budget"]) == ("longflow", 0.2)
    proved = summary["kv_engine"]
    assert (proved["layers"], proved["block_size"], proved["cap_blocks"]) == (4, 32, 2)
    assert proved["concurrency"] == 256 and proved["blocks"] // proved["cap_blocks"] > 4000  # 1 GiB
    assert "kv: longflow, 37 slots a sequence of up to 188 tokens (0.2 of it)" in out
    for row in rows(folder):  # far beyond rounding: the sampler is another policy, and it is the cache that makes it so
        assert row["mismatch/mean/cache"] > 1e-3 > 1e-4 > row["mismatch/mean/precision"]
    assert summary["mismatch"]["mean/cache"] > 1e-3
    assert "kv=longflow 0.2" in (folder / "report.html").read_text()

    other = ["kv=longflow", "kv.budget=0.5", "ratio.reference=mu", "resume=auto"]
    code, out = run(*SHORT, *other, f"output={tmp_path}", "name=run", path=tmp_path)
    assert code == 2 and "kv.budget: 0.2 -> 0.5" in out, out


@pytest.mark.full
@allow(1)
@pytest.mark.parametrize("policy", POLICIES)
def test_every_policy_trains(policy, tmp_path):
    folder, summary, _ = trained(tmp_path, *LONG, f"kv={policy}", f"kv.budget={POLICIES[policy]}")
    assert summary["kv"] == policy and summary["kv_engine"]["layers"] == 4
    assert max(row["mismatch/mean/cache"] for row in rows(folder)) > 1e-4


@pytest.mark.full
@allow(1)
def test_a_model_is_evaluated_under_the_cache_that_is_asked_for():
    small = ["task.max_response_tokens=192", "samples=2", "problems=4", "kv=longflow"]
    code, out = run(*small, module="rltk.evaluate")
    assert code == 0, out
    figures = json.loads(out.splitlines()[-1])
    assert (figures["kv"], figures["kv_budget"], figures["problems"]) == ("longflow", 0.2, 4)


@allow(1)
def test_a_run_without_a_correction_is_warned_and_a_budget_too_small_is_refused(tmp_path):
    code, out = run(*SHORT, "kv=longflow", "dry_run=true", f"output={tmp_path}")
    assert code == 0 and "warning: kv=longflow with ratio.reference = 'old' and correction = 'none'" in out, out
    assert "2 blocks, 128 KiB; 6 in full, so 3 x the sequences" in " ".join(out.split())
    code, out = run(*SHORT, "kv=longflow", "kv.budget=0.1", f"output={tmp_path}")
    assert code == 2 and "kv.budget=18 tokens (0.1 of the context of 189)" in out, out
    assert not (tmp_path / "run").exists()


def recording_engine() -> tuple[list[tuple[int, list]], list]:
    """([prompt length, death times], log-probs of a probe) of a RolloutEngine that keeps 40 slots and records."""
    from rltk.rollout.engine import EngineOptions, Request, RolloutEngine
    from rltk.rollout.kv.options import KVOptions

    kv = KVOptions("longflow", 40, record=True)
    engine = RolloutEngine(EngineOptions(str(TINY), "float32", 129, "cpu", 8, 0.02, threads=1, kv=kv))
    prompts = {f"r{length}": list(range(5, 5 + length)) for length in (10, 60)}
    engine.add([Request(uid, ids, 60, 1.0, 3, ()) for uid, ids in prompts.items()])
    found = []
    while engine.unfinished:
        for done in engine.step():
            assert done.deaths is not None and done.deaths.shape[-1] == len(prompts[done.uid]) + len(done.ids)
            found.append((len(prompts[done.uid]), done.deaths.tolist()))
    return found, engine.score([list(range(5, 65))])[0].tolist()


@pytest.mark.timeout(300)
def test_completions_carry_death_times_and_the_probe_reads_no_cache():
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        found, scored = pool.apply(recording_engine)
    assert len(found) == 2
    for prompt, deaths in found:
        died = torch.tensor(deaths)
        for query in range(prompt, died.shape[-1] - 1):  # of the last token nobody asked
            seen = (died[..., : query + 1] > query).sum(-1)
            assert (seen == min(query + 1, 40)).all()
    from transformers import AutoModelForCausalLM

    ids = torch.tensor([list(range(5, 65))])
    with torch.no_grad():
        logits = AutoModelForCausalLM.from_pretrained(TINY, dtype=torch.float32)(ids).logits[0, :-1]
    expected = logits.log_softmax(-1).gather(-1, ids[0, 1:, None])[:, 0]
    assert (expected - torch.tensor(scored)).abs().max() < 1e-4
