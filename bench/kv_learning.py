"""`python -m bench.kv_learning lab [--compression 80 50 35 0] [--seeds 5] [--device gpu]`   or   `... road`

Can a policy learn from samples that were taken with a compressed KV cache? `arithmetic_long` asks at the end for a
result of the first steps. A compression of 80 % is a budget of 20 % of prompt + longest response, policy `longflow`.

  lab    torch sampler with the reference cache (rltk.lab), several seeds: full cache, and for each compression GRPO
         uncorrected, with correction=sparse, with correction=prefix_min, and CTPO and MinPRO against the sampler's own
         log-probs (ratio.reference=mu). Clip, dual clip, aggregation, std and learning rate are the same for all;
         `ctpo own` is CTPO with its published window besides. Evaluation is with the full cache.
  road   the same through vLLM, Ray and DeepSpeed (rltk.train): grpo uncorrected and ctpo, at 80 %; see kv_learning_road

A compression is one process that trains all its runs side by side. It writes what it has after every evaluation to
`--cells`; one that is complete there is not run again. Writes kv_learning.json (section `lab`), kv_learning.md and
kv_learning_lab.png to `--out` (docs/results).
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bench.offpolicy import COMMON, FAR
from rltk.files import without_nan, write_json
from rltk.lab.arm import Arm, Settings
from rltk.manifest import versions
from rltk.rollout.kv.options import KVOptions

# Name -> what is different: the arms of a compressed cache, then those of the full one.
COMPRESSED: dict[str, dict[str, Any]] = {
    "grpo": {"algorithm": "grpo", "options": COMMON},
    "grpo + sparse": {"algorithm": "grpo", "options": COMMON, "correction": "sparse"},
    "grpo + prefix_min": {"algorithm": "grpo", "options": COMMON, "correction": "prefix_min"},
    "ctpo": {"algorithm": "ctpo", "options": COMMON, "reference": "mu"},
    "minpro": {"algorithm": "minpro", "options": COMMON, "reference": "mu"},
    "ctpo own": {"algorithm": "ctpo", "reference": "mu"},
}
FULL = ("grpo", "ctpo", "ctpo own")
PROMPT, RESPONSE = 64, 512  # the longest, in tokens: conf/task/arithmetic_long.yaml
HELD_OUT = ("step", "accuracy", "greedy", "flawed", "kl/start")
# Of every training step; `tail` is the 5th percentile of min(xi, 1/xi) in the worst hundred positions.
TRAIN = {
    "sampled": "accuracy/train", "length": "length", "kl": "mismatch/kl", "tail_per_1k": "mismatch/tail_per_1k",
    "unsupported": "mismatch/unsupported", "alarm": "mismatch/alarm", "dropped": "correction/tokens",
    "weight": "correction/weight", "clipped": "clip/share", "grad_norm": "grad_norm",
}  # fmt: skip


def arms(compression: int, seeds: int) -> list[Arm]:
    names = COMPRESSED if compression else FULL
    return [Arm(f"{name}-s{seed}", **COMPRESSED[name], seed=seed) for name in names for seed in range(seeds)]


def cache(compression: int) -> KVOptions:
    return KVOptions("longflow", 1 - compression / 100) if compression else KVOptions()


def run_cell(compression: int, settings: Settings, seeds: int, file: Path) -> None:
    """Train a compression's runs; their figures so far go to `file` after every evaluation."""
    import torch

    from bench.kv_learning_report import hardware
    from rltk.lab.loop import Lab
    from rltk.tasks.arithmetic_long import ArithmeticLong

    torch.set_num_threads(1)
    runs = arms(compression, seeds)
    lab = Lab(ArithmeticLong(PROMPT, RESPONSE), runs, settings, PROMPT, RESPONSE)
    started, rows = time.perf_counter(), []
    for row in lab.run():
        rows.append(row)
        if "accuracy" not in row[0]:
            continue
        step, seconds = row[0]["step"], round(time.perf_counter() - started, 1)
        means = {}
        for arm, figure in zip(runs, row, strict=True):
            means.setdefault(arm.name.rsplit("-", 1)[0], []).append(figure["accuracy"])
        text = "  ".join(f"{name} {statistics.fmean(values):.3f}" for name, values in means.items())
        print(f"compression {compression} % step {step} {seconds:.0f} s  {text}", flush=True)
        found = {arm.name: figures([r[i] for r in rows]) for i, arm in enumerate(runs)}
        done = {"steps": step, "complete": step == settings.steps, "seconds": seconds, "hardware": hardware(),
                "versions": versions(), "runs": found}  # fmt: skip
        write_json(file, without_nan(done))


def figures(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """One run: its curves by column, and what the tables show."""
    held_out = [row for row in rows if "accuracy" in row]
    train = [row for row in rows if "reward" in row]
    curve = {key: [row[key] for row in held_out] for key in HELD_OUT}
    steps = {name: [row.get(key) for row in train] for name, key in TRAIN.items()}
    steps["tail"] = [min(tails.values(), default=None) for tails in map(_tails, train)]
    late = train[-max(1, len(train) // 4) :]
    best, final = max(curve["accuracy"]), curve["accuracy"][-1]
    broken = bool(train and train[-1]["broken"])
    return {
        "final": final, "best": best, "greedy": curve["greedy"][-1], "flawed": curve["flawed"][-1], "broken": broken,
        "collapsed": broken or final < best - FAR, "kl_start": max(curve["kl/start"]),
        "sampled": _mean([row["accuracy/train"] for row in late]), "dropped": _mean(steps["dropped"]),
        "tail_per_1k": _mean(steps["tail_per_1k"]), "unsupported": _mean(steps["unsupported"]),
        "clipped": _mean(steps["clipped"]), "alarms": sum(bool(alarm) for alarm in steps["alarm"]),
        "tail_by_position": _by_position(train), "curve": curve, "steps": steps,
    }  # fmt: skip


def _tails(row: dict[str, Any]) -> dict[str, float]:
    """The tail by positions, as "101-200", of one training step."""
    prefix = "mismatch/tail_p05/"
    return {name.removeprefix(prefix): value for name, value in row.items() if name.startswith(prefix)}


def _by_position(train: Sequence[dict[str, Any]]) -> dict[str, float]:
    found: dict[str, list[float]] = {}
    for row in train:
        for positions, tail in _tails(row).items():
            found.setdefault(positions, []).append(tail)
    return {positions: statistics.fmean(tails) for positions, tails in found.items()}


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return statistics.fmean(known) if known else None


def run_all(arguments: argparse.Namespace, folder: Path) -> dict[int, Any]:
    """Every compression in a process of its own, `parallel` at a time; what they wrote."""
    waiting, running = list(arguments.compression), {}
    while waiting or running:
        while waiting and len(running) < arguments.parallel:
            cell = waiting.pop(0)
            command = [
                sys.executable,
                "-m",
                "bench.kv_learning",
                *sys.argv[1:],
                "--cell",
                str(cell),
                "--cells",
                str(folder),
            ]
            if not read(folder, [cell]).get(cell, {}).get("complete"):
                running[cell] = subprocess.Popen(command)
        for cell in [c for c, process in running.items() if process.poll() is not None]:
            if code := running.pop(cell).returncode:
                print(f"compression {cell} % ended with {code}", flush=True)
        time.sleep(0.5)
    return read(folder, arguments.compression)


def read(folder: Path, compressions: Sequence[int]) -> dict[int, Any]:
    files = {c: folder / f"{c}.json" for c in compressions}
    return {c: json.loads(file.read_text()) for c, file in files.items() if file.exists()}


def lab(arguments: argparse.Namespace) -> int:
    from bench.kv_learning_report import report

    settings = _settings(arguments)
    if arguments.cell is not None:
        file = arguments.cells / f"{arguments.cell}.json"
        run_cell(arguments.cell, settings, arguments.seeds, file)
        return 0
    with tempfile.TemporaryDirectory() as temporary:
        folder = arguments.cells or Path(temporary)
        cells = read(folder, arguments.compression) if arguments.report else run_all(arguments, folder)
    if not cells:
        print("no results")
        return 1
    report(cells, settings, f"python -m bench.kv_learning {' '.join(sys.argv[1:])}", arguments.out)
    return 0 if all(cells.get(c, {}).get("complete") for c in arguments.compression) else 1


def main() -> int:
    from bench.kv_learning_road import ARMS, road

    parser = argparse.ArgumentParser(prog="python -m bench.kv_learning", description=__doc__)
    parser.add_argument("where", choices=["lab", "road"])
    parser.add_argument("--out", type=Path, default=Path("docs/results"))
    parser.add_argument("--seeds", type=int, default=None, help="5 in the lab, 1 on the road")
    parser.add_argument("--parallel", type=int, default=1, help="lab: compressions at once")
    parser.add_argument("--compression", type=int, nargs="+", default=[80, 50, 35, 0], help="lab: %%; 0: full")
    parser.add_argument("--steps", type=int, default=32, help="lab")
    parser.add_argument("--prompts", type=int, default=16, help="lab: prompts a training step")
    parser.add_argument("--lr", type=float, default=1e-4, help="lab")
    parser.add_argument("--problems", type=int, default=64, help="lab: held out")
    parser.add_argument("--every", type=int, default=8, help="lab: training steps between evaluations")
    parser.add_argument("--device", choices=["cpu", "gpu"], default="cpu", help="lab")
    parser.add_argument("--cells", type=Path, default=None, help="lab: a folder for what is done, to go on from it")
    parser.add_argument("--report", action="store_true", help="lab: of what --cells has, without running anything")
    parser.add_argument("--cell", type=int, default=None, help=argparse.SUPPRESS)
    parser.add_argument("--label", default="cpu", help="road: what the runs are called in the results")
    parser.add_argument("--arms", nargs="+", choices=list(ARMS), default=list(ARMS), help="road: of those to run")
    parser.add_argument("keys", nargs="*", help="road: key=value for rltk.train")
    arguments = parser.parse_intermixed_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    arguments.seeds = arguments.seeds or (5 if arguments.where == "lab" else 1)
    return lab(arguments) if arguments.where == "lab" else road(arguments)


def _settings(arguments: argparse.Namespace) -> Settings:
    import rltk

    return Settings(
        model=str(Path(rltk.__file__).parent / "models" / "tiny"), steps=arguments.steps, prompts=arguments.prompts,
        lr=arguments.lr, problems=arguments.problems, evaluate_every=arguments.every, device=arguments.device,
        kv=cache(arguments.cell or 0),
    )  # fmt: skip


if __name__ == "__main__":
    sys.exit(main())
