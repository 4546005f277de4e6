"""The step arm of bench.genrm_service: what a judge adds to a training step on one GPU that it shares.

FAPO with and without its judge, which is asked about every answer that the rule found right. On a GPU both models are
SmolLM2: the policy (float32) after a warm start on solutions of 24 to 30 steps, some 430 tokens, which this makes where
`--start` is not there yet; the judge (bfloat16) as it comes, but that nothing ends its replies before 256 tokens. It is
bench.genrm_parts:Reader, whose questions are all asked, none joined, and who finds every solution sound: the same
samples are trained on with and without it. On a CPU both are the tiny ones, which shows that it works.

Splits of the GPU's memory are the policy's engine's share and the judge's; the learner has the rest, in the runs
without the judge too. Those come first and last: a machine that changes meanwhile shows.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from bench.genrm_parts import ROOT, model_folder, unending

LIMIT_S = 1800  # of a run, and of the warm start
COMMON = ["algorithm=fapo", "tracker=none", "evaluation.every=0", "evaluation.problems=8", "evaluation.samples=1",
          "checkpoint.every=0"]  # fmt: skip
LEVELS = [24, 27, 30]
LEAST_RIGHT = 0.25  # of a step's answers; a run with fewer says nothing of a judge that is asked about those
ON_GPU = ["task=arithmetic_long", f"task.levels={LEVELS}", "task.max_prompt_tokens=96", "task.max_response_tokens=512",
          "rollout.enforce_eager=false", "batch.prompts=128"]  # fmt: skip
ON_CPU = ["model=tiny", "task.levels=[1]", "batch.prompts=8", "rollout.kv_cache_gib=0.25"]
JUDGE = ["reward.genrm.evaluate=false", "reward.genrm.judge=bench.genrm_parts:Reader"]
TOKENS = 256  # of the judge's replies, on a GPU
JUDGE_ON_GPU = ["reward.genrm.dtype=bfloat16", "reward.genrm.enforce_eager=false", "reward.genrm.context=2048",
                "reward.genrm.max_sequences=256", f"reward.genrm.judge_options.max_tokens={TOKENS}"]  # fmt: skip
JUDGE_ON_CPU = ["reward.genrm=tiny", "reward.genrm.judge_options={template: fapo_short.v1, max_tokens: 128}"]
JUDGED = ("genrm/asked", "genrm/unknown", "genrm/replies", "genrm/seconds", "genrm/seconds_p95")


def run(
    arguments: argparse.Namespace, say: Callable[[str], None], keep: Callable[[dict[str, Any]], None]
) -> dict[str, Any]:
    """keep: is given the figures so far after every run with the judge."""
    gpu = arguments.device == "gpu"
    splits = arguments.shares if gpu else [":"]  # a CPU's memory is not shared out
    common = [*COMMON, *([f"model={_start(arguments.start)}", *ON_GPU] if gpu else ON_CPU), f"steps={arguments.steps}",
              f"cluster.device={arguments.device}", *arguments.keys]  # fmt: skip
    alone: dict[str, list[dict[str, Any]]] = {split.partition(":")[0]: [] for split in splits}
    judged: dict[str, dict[str, Any]] = {}

    def train_alone() -> None:
        for mine, runs in alone.items():
            runs.append(found := _train([*common, *_share("rollout", mine)]))
            if found["right"] < LEAST_RIGHT:
                raise RuntimeError(
                    f"in one step the policy got {found['right']:.1%} right: a judge of these has too little to "
                    "read; give another --start, or a lower learner.lr if the first step's accuracy was higher"
                )
            say(f"{mine:12} step {found['step_s']:.2f} s alone: {_stages(found)}")

    def figures() -> dict[str, Any]:
        base = {
            mine: statistics.median(s for found in runs for s in found["steps_s"][1:]) for mine, runs in alone.items()
        }
        added = {split: found["step_s"] / base[split.partition(":")[0]] - 1 for split, found in judged.items()}
        return {"device": arguments.device, "steps": arguments.steps, "added_step_share": min(added.values()),
                "added_shares": added, "alone": alone, "judged": judged}  # fmt: skip

    train_alone()
    with tempfile.TemporaryDirectory() as folder:
        judge = [*JUDGE, *JUDGE_ON_CPU]
        if gpu:
            judge = [*JUDGE, f"reward.genrm={unending(Path(model_folder('smollm2')), Path(folder))}", *JUDGE_ON_GPU]
        for split in splits:
            mine, _, its = split.partition(":")
            found = _train([*common, *_share("rollout", mine), *judge, *_share("reward.genrm", its)])
            if not found["counts"].get("asked"):
                raise RuntimeError("the judge was asked nothing: the policy got nothing right, see its accuracy above")
            if gpu and found["tokens_per_reply"] < TOKENS:
                raise RuntimeError(f"replies of {found['tokens_per_reply']:.1f} tokens in place of {TOKENS}")
            judged[split] = found
            added = figures()["added_shares"][split]
            say(f"{split:12} step {found['step_s']:.2f} s with the judge: {added:+.1%}; {_stages(found)}; "
                f"{found['counts']}; {found['judge']}")  # fmt: skip
            keep(figures())
    train_alone()
    for split, added in figures()["added_shares"].items():
        say(f"{split:12} {added:+.1%}, against both runs alone")
    return figures()


def _start(folder: Path) -> Path:
    """The policy's warm start."""
    if not (folder / "config.json").exists():
        examples = {"examples": 8192, "batch": 64, "levels": {level: {"sound": 1.0} for level in LEVELS}}
        tasks = {"arithmetic_long": examples}  # written as Python writes it, which is YAML, too
        keys = [f"init={model_folder('smollm2')}", f"out={folder}", "steps=150", "lr=1e-4", "warmup=20",
                "weight_decay=0.0", "tokens_per_row=1024", "held_out={problems: 2, samples: 1}",
                f"tasks={tasks}"]  # fmt: skip
        subprocess.run([sys.executable, "-m", "rltk.sft", *keys], check=True, timeout=LIMIT_S)
    return folder.resolve()


def _train(keys: list[str]) -> dict[str, Any]:
    """Seconds of a step (the median of all but the first), its parts likewise, and what the judge counted."""
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))  # the judge is found by it
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "rltk.train", *keys, f"output={folder}", "name=run"]
        subprocess.run(command, check=True, timeout=LIMIT_S, env={**os.environ, "PYTHONPATH": path})
        rows = [json.loads(line) for line in (Path(folder) / "run" / "metrics.jsonl").read_text().splitlines()]
    stages = [name for name in rows[-1] if name.startswith("time/")]
    shown = [name for name in (*JUDGED, "accuracy", "length/mean") if name in rows[-1]]

    def median(name: str) -> float:
        return statistics.median(row.get(name, 0.0) for row in rows[1:])

    counts = {name[12:]: value for name, value in rows[-1].items() if name.startswith("genrm/total/")}
    steps = [row["time/step"] - row["time/evaluate"] for row in rows]  # the last one is followed by an evaluation
    return {
        "step_s": statistics.median(steps[1:]),
        "steps_s": steps,
        "right": min(row["accuracy"] for row in rows[1:]),
        "stages": {name[5:]: median(name) for name in stages},
        "judge": {name: median(name) for name in shown},
        "counts": counts,  # of the whole run; its evaluations ask nothing
        "tokens_per_reply": counts["tokens"] / counts["replies"] if counts.get("replies") else None,
    }


def _share(of: str, share: str) -> list[str]:
    return [f"{of}.gpu_memory_share={share}"] if share else []


def _stages(found: dict[str, Any]) -> str:
    parts = {name: seconds for name, seconds in found["stages"].items() if name not in ("step", "evaluate")}
    return ", ".join(f"{name} {seconds:.1f}" for name, seconds in parts.items())
