"""`python -m bench.kv_learning road [--seeds 1] [--label cpu] [--arms grpo] [key=value ...]`: with the real stack.

GRPO uncorrected and CTPO against the sampler's log-probs, with `kv=longflow kv.budget=0.2` (80 % compression), and grpo
with the full cache. Keys go to rltk.train, so the same arms run with another model and task, as in

    python -m bench.kv_learning_warm      # a start for SmolLM2, which else answers nothing right
    python -m bench.kv_learning road --label smollm2 cluster.device=gpu learner.lr=1e-5 <the last line of that>

Results go to section `road` of kv_learning.json under `--label`, after every run; what other labels have stays.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from bench.kv_learning_report import hardware, put_section, section
from bench.learning import result

COMPRESSED = ["kv=longflow", "kv.budget=0.2"]
ARMS = {
    "grpo": ["algorithm=grpo", *COMPRESSED],
    "ctpo": ["algorithm=ctpo", "ratio.reference=mu", *COMPRESSED],
    "grpo, full cache": ["algorithm=grpo", "kv=full"],
}
# Of arithmetic_long on two CPU cores; a key given on the command line comes later and wins.
DEFAULTS = ["task=arithmetic_long", "batch.prompts=16", "steps=16", "evaluation.every=4", "evaluation.problems=64"]
KEPT = ("final_accuracy", "initial_accuracy", "final_greedy", "steps", "wall_seconds", "config_hash", "curve")
SERIES = ("accuracy", "length/mean", "mismatch/kl", "mismatch/mean", "mismatch/tail_per_1k", "mismatch/alarm",
          "clip/share", "grad_norm")  # fmt: skip


def commands(seeds: int, arms: list[str], extra: list[str], folder: Path) -> dict[str, list[str]]:
    """name -> command: every arm and seed, those of a seed together."""
    jobs = {}
    for seed in range(seeds):
        for number, (name, keys) in enumerate(ARMS.items()):
            if name not in arms:
                continue
            own = [k for k in extra if not (k.startswith("kv") and "kv=full" in keys)]
            jobs[f"{name}-s{seed}"] = [
                sys.executable, "-m", "rltk.train", *DEFAULTS, *keys, *own, f"seed={seed}", f"name=run{number}-s{seed}",
                f"output={folder}", "tracker=none",
            ]  # fmt: skip
    return jobs


def road(arguments: argparse.Namespace) -> int:
    """Run what the results lack, one after another; write after each."""
    file, label = arguments.out / "kv_learning.json", arguments.label
    failed = []
    with tempfile.TemporaryDirectory() as folder:
        for name, command in commands(arguments.seeds, arguments.arms, arguments.keys, Path(folder)).items():
            runs = section(file, "road").get(label, {}).get("runs", {})
            if name in runs:
                print(f"{label}, {name}: there already", flush=True)
                continue
            print(f"{label}, {name}: {' '.join(command[2:])}", flush=True)
            if subprocess.run(command).returncode:
                failed.append(name)
                continue
            place = next(part.removeprefix("name=") for part in command if part.startswith("name="))
            runs[name] = run_result(Path(folder) / place) | {"keys": command[3:-3]}
            mine = {"hardware": hardware(), "command": f"python -m bench.kv_learning {' '.join(sys.argv[1:])}"}
            put_section(file, "road", section(file, "road") | {label: mine | {"runs": runs}})
            try:
                runs[name] |= with_full_cache(Path(folder) / place, command[3:-2])
            except RuntimeError as error:  # the run is written, and the next can be made
                print(f"{label}, {name}: {error}", flush=True)
                failed.append(f"{name}, with the full cache")
            put_section(file, "road", section(file, "road") | {label: mine | {"runs": runs}})
            print(json.dumps({name: {key: runs[name][key] for key in KEPT[:3]}}), flush=True)
    if failed:
        print(f"ended with an error: {', '.join(failed)}")
    return 1 if failed else 0


def with_full_cache(folder: Path, keys: list[str]) -> dict[str, Any]:
    """What the trained model is worth where nothing is compressed: a run evaluates with the cache it samples with."""
    kept = ("task", "evaluation.problems", "evaluation.samples", "cluster", "rollout")
    of_task = [key for key in keys if key.partition("=")[0].startswith(kept)]
    command = [sys.executable, "-m", "rltk.evaluate", f"model={folder / 'model'}", *of_task]
    found = subprocess.run(command, stdout=subprocess.PIPE, text=True)
    if found.returncode:
        raise RuntimeError(f"{' '.join(command[1:])} ended with {found.returncode}")
    figures = json.loads(found.stdout.strip().splitlines()[-1])
    return {"full_cache": {key: value for key, value in figures.items() if key.startswith(("avg@", "greedy"))}}


def run_result(folder: Path) -> dict[str, Any]:
    """What a run folder says: held-out curve, and by training step what the mismatch did."""
    found = result(folder)
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    steps = {name: [row.get(name) for row in rows] for name in SERIES}
    tails = [[v for k, v in row.items() if k.startswith("mismatch/tail_p05/")] for row in rows]
    steps["tail"] = [min(values, default=None) for values in tails]
    known = [value for value in steps["mismatch/tail_per_1k"] if value is not None]
    return {
        **{key: found[key] for key in KEPT}, "alarms": sum(bool(a) for a in steps["mismatch/alarm"]),
        "tail_per_1k": statistics.fmean(known) if known else None, "train": steps,
    }  # fmt: skip
