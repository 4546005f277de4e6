"""All of it at once through the real stack: a judge, a tool in the jail, a compressed cache and its correction."""

from __future__ import annotations

import json
import math

import pytest
import torch
from safetensors.torch import load_file

from tests.integration.places import TINY
from tests.integration.test_road import allow, rows, run

# Half of the warm start's samples call Python, so that none of 24 does would be a miracle; nearly as many are right.
SMALL = ["tracker=none", "steps=3", "batch.prompts=4", "batch.samples=6", "evaluation.every=0", "evaluation.problems=6",
         "evaluation.samples=2", "evaluation.greedy=false", "task.levels=[1,2]"]  # fmt: skip


@allow(1)
@pytest.mark.parametrize("algorithm", ["fapo", "ctpo"])
def test_everything_at_once_trains(algorithm, tmp_path):
    code, out = run("experiment=everything", *SMALL, f"algorithm={algorithm}", f"output={tmp_path}", "name=run")
    assert code == 0, out
    folder = tmp_path / "run"
    summary = json.loads((folder / "summary.json").read_text())
    assert (summary["status"], summary["steps"], summary["algorithm"]) == ("finished", 3, algorithm)
    before, after = (load_file(path / "model.safetensors") for path in (TINY.parent / "tiny_tool", folder / "model"))
    assert any(not torch.equal(before[name].float(), tensor.float()) for name, tensor in after.items())

    assert summary["tools"] == {"isolation": "strict", "tools": ["python"]} and "isolation strict" in out
    assert (summary["kv"], summary["kv_budget"], summary["kv_engine"]["layers"]) == ("longflow", 64, 4)
    found = rows(folder)
    for row in found:
        assert all(math.isfinite(row[name]) for name in ("loss", "grad_norm")) and row["probe/max"] < 1e-4
        assert 0 < row["tools/used"] <= 1 and row["tools/status/ok"] > 0
        assert "correction/weight" in row and row["mismatch/mean/precision"] < 1e-4
        assert row["genrm/replicas_down"] == 0 and row["failed"] == 0
    assert max(row["mismatch/mean/cache"] for row in found) > 1e-6  # some sequence outgrew its slots
    asked = [row for row in found if "genrm/asked" in row]  # a step may have no right answer to ask about
    assert asked and all(row["genrm/unknown"] < 1 and row["genrm/flawed"] >= 0 for row in asked)
    assert "genrm/drift" in found[-1] and found[-1]["genrm/drift"] == 0

    first, last = rows(folder, "evaluations")
    assert (first["step"], last["step"]) == (0, 3) and first["avg@2"] > 0 and first["genrm/asked"] > 0
    report = (folder / "report.html").read_text()
    assert all(words in report for words in ("Verdicts", "kv=longflow 64", "How calls end"))
