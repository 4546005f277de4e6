"""Training with a tool, as a user starts it: jail, executors, turns, learner, evaluation, report."""

import json

from tests.integration.test_road import SMALL, allow, rows, run

# Half of the warm start's samples call Python, so that none of 24 does would be a miracle; evaluation has T = 1 too.
RUN = ["experiment=tool_arithmetic", *SMALL, "steps=2", "batch.samples=6", "evaluation.every=0", "attc.mode=eval"]


@allow(1)
def test_a_run_with_a_tool_trains_on_what_was_sampled_and_says_how_its_calls_ended(tmp_path):
    code, out = run(*RUN, f"output={tmp_path}", "name=run")
    assert code == 0, out
    assert "tools: python; isolation strict" in out
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert (summary["status"], summary["steps"]) == ("finished", 2)
    assert summary["tools"] == {"isolation": "strict", "tools": ["python"]}
    for row in rows(tmp_path / "run"):
        assert row["probe/max"] < 1e-4 and row["failed"] == 0
        assert row["mismatch/mean"] < 1e-4  # learner and sampler agree on sampled tokens, with results between them
        assert 0 < row["tools/used"] <= 1 and row["tools/status/ok"] > 0 and row["tools/run_s"] > 0
        assert "attc/trust" not in row  # in evaluations alone
    first, last = rows(tmp_path / "run", "evaluations")
    assert (first["step"], last["step"]) == (0, 2) and first["tools/calls"] > 0 and "attc/trust" in first
    assert "tools" in (tmp_path / "run" / "report.html").read_text().lower()
