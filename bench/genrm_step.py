"""The step arm of bench.genrm_service: what a judge adds to a training step on one GPU that it shares.

The same run with and without the judge, which is asked about every answer that the rule found right. Both models are
SmolLM2 (the tiny ones on a CPU), the policy in float32, the judge in bfloat16 with replies of at most 512 tokens.
Splits of the GPU's memory are the policy's engine's share and the judge's; the learner has the rest, in the run without
the judge too.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from bench.genrm_parts import SMOLLM2

COMMON = ["algorithm=ctpo", "tracker=none", "evaluation.every=0", "evaluation.problems=8", "checkpoint.every=0",
          "task.levels=[1]"]  # fmt: skip
ON_GPU = ["model=smollm2", "rollout.enforce_eager=false", "task.max_response_tokens=256",
          "batch.prompts=64"]  # fmt: skip
JUDGE_ON_GPU = [f"reward.genrm={SMOLLM2}", "reward.genrm.dtype=bfloat16", "reward.genrm.enforce_eager=false",
                "reward.genrm.context=2048", "reward.genrm.judge_options.max_tokens=512",
                "reward.genrm.evaluate=false"]  # fmt: skip
ON_CPU = ["model=tiny", "batch.prompts=8", "rollout.kv_cache_gib=0.25"]
JUDGE_ON_CPU = ["reward.genrm=tiny", "reward.genrm.evaluate=false"]
JUDGED = ("genrm/asked", "genrm/unknown", "genrm/replies", "genrm/seconds", "genrm/seconds_p95")


def run(arguments: argparse.Namespace, say: Callable[[str], None]) -> dict[str, Any]:
    gpu = arguments.device == "gpu"
    common = [*COMMON, *(ON_GPU if gpu else ON_CPU), f"steps={arguments.steps}", f"cluster.device={arguments.device}",
              *arguments.keys]  # fmt: skip
    splits = arguments.shares if gpu else ["cpu"]
    figures: dict[str, Any] = {"device": arguments.device, "steps": arguments.steps, "splits": {}}
    for split in splits:
        mine, _, its = split.partition(":")
        own = [f"rollout.gpu_memory_share={mine}"] if gpu else []
        judge = [*JUDGE_ON_GPU, f"reward.genrm.gpu_memory_share={its}"] if gpu else JUDGE_ON_CPU
        alone = _train([*common, *own])
        say(f"{split:12} step {alone['step_s']:.2f} s alone")
        judged = _train([*common, *own, *judge])
        added = judged["step_s"] / alone["step_s"] - 1
        figures["splits"][split] = {"alone": alone, "judged": judged, "added_share": added}
        say(f"{split:12} step {judged['step_s']:.2f} s with the judge: {added:+.1%}; "
            f"{judged['counts']}; {judged['judge']}")  # fmt: skip
    figures["added_step_share"] = min(split["added_share"] for split in figures["splits"].values())
    return figures


def _train(keys: list[str]) -> dict[str, Any]:
    """Seconds of a step (the median of all but the first), its parts likewise, and what the judge counted."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "rltk.train", *keys, f"output={folder}", "name=run"]
        subprocess.run(command, check=True, timeout=3600, stdout=subprocess.DEVNULL)
        rows = [json.loads(line) for line in (Path(folder) / "run" / "metrics.jsonl").read_text().splitlines()]
    stages = [name for name in rows[-1] if name.startswith("time/")]
    judge = [name for name in JUDGED if name in rows[-1]]

    def median(name: str) -> float:
        return statistics.median(row.get(name, 0.0) for row in rows[1:])

    counts = {name[12:]: value for name, value in rows[-1].items() if name.startswith("genrm/total/")}
    return {
        "step_s": median("time/step"),
        "stages": {name[5:]: median(name) for name in stages},
        "judge": {name: median(name) for name in judge},
        "counts": counts,  # of the whole run; its evaluations ask nothing
        "tokens_per_reply": counts["tokens"] / counts["replies"] if counts.get("replies") else None,
    }
