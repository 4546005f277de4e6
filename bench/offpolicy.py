"""`python -m bench.offpolicy [--table equal own] [--seeds 5] [--steps 64] [--parallel 9] [--device gpu]`

Which objective for how stale samples? Staleness 0, 4, 16 weight versions x 1, 4, 16 minibatches, several seeds each, in
the lab (rltk.lab). Ratios are taken against the sampler (ratio.reference=mu). Two tables:

  equal   clip, dual clip, aggregation, std and learning rate are the same; only the method's own element differs
  own     each paper's own defaults

A cell (staleness, minibatches) is one process that trains all its runs side by side; its figures go to `--cells`, and a
cell that is there is not run again. Writes offpolicy.json, .md and plots to `--out` (docs/results).
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

from rltk.files import without_nan, write_json
from rltk.lab.arm import Arm, Settings

METHODS = ("grpo", "gspo", "cispo", "minpro", "ctpo", "dgpo", "fapo")
STALENESS, MINIBATCHES = (0, 4, 16), (1, 4, 16)
# The published off-policy forms keep their own clip and aggregation; here these are GRPO's for everyone.
COMMON: dict[str, Any] = {
    "clip_low": 0.2, "clip_high": 0.2, "dual_clip": None, "aggregation": "seq-mean-token-mean", "std": True
}  # fmt: skip
KEPT = ("step", "accuracy", "greedy", "flawed", "kl/start")
FAR = 0.2  # a run has collapsed if it ends so much below its own best, or its gradient stopped being finite


def arms(table: str, staleness: int, seeds: int) -> list[Arm]:
    """Every method and seed of a cell."""
    options = {name: (dict(COMMON) if table == "equal" else {}) for name in METHODS}
    return [
        Arm(f"{name}-s{seed}", name, options[name], reference="mu", staleness=staleness, seed=seed)
        for name in METHODS
        for seed in range(seeds)
    ]


def run_cell(table: str, staleness: int, minibatches: int, seeds: int, settings: Settings) -> dict[str, Any]:
    """Train a cell; each run's figures by name."""
    import torch

    from rltk.config import Task as TaskConfig
    from rltk.lab.loop import Lab
    from rltk.tasks import build_task

    torch.set_num_threads(1)
    task, runs = TaskConfig(), arms(table, staleness, seeds)
    lab = Lab(build_task(task), runs, replace(settings, minibatches=minibatches), task.max_prompt_tokens,
              task.max_response_tokens)  # fmt: skip
    started = time.perf_counter()
    rows: list[list[dict[str, Any]]] = []
    for row in lab.run():
        rows.append(row)
        if "accuracy" in row[0]:
            mean = sum(r["accuracy"] for r in row) / len(row)
            print(f"staleness {staleness} minibatches {minibatches} step {row[0]['step']} accuracy {mean:.3f} "
                  f"{time.perf_counter() - started:.0f} s", flush=True)  # fmt: skip
    return {arm.name: figures([row[i] for row in rows]) for i, arm in enumerate(runs)}


def figures(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """One run: its curve, and what the tables show."""
    curve = [{key: row[key] for key in KEPT} for row in rows if "accuracy" in row]
    train = [row for row in rows if "reward" in row]

    def values(name: str) -> list[float]:
        return [row[name] for row in train if name in row]

    noise, clipped = values("gradient/noise"), values("clip/share")
    best, final = max(point["accuracy"] for point in curve), curve[-1]["accuracy"]
    broken = bool(train[-1]["broken"])
    return {
        "final": final, "best": best, "greedy": curve[-1]["greedy"], "flawed": curve[-1]["flawed"],
        "broken": broken, "collapsed": broken or final < best - FAR,
        "kl_start": max(point["kl/start"] for point in curve), "kl_sampler": max(values("kl/sampler"), default=None),
        "noise": sum(noise) / len(noise) if noise else None,
        "clipped": sum(clipped) / len(clipped) if clipped else None,
        "grad_norm": sum(values("grad_norm")) / max(1, len(values("grad_norm"))),
        "curve": curve,
    }  # fmt: skip


def run_all(arguments: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Every cell in a process of its own, `parallel` at a time; figures by table, then cell."""
    waiting = [(t, s, m) for t in arguments.table for m in reversed(arguments.minibatches) for s in arguments.staleness]
    running: dict[tuple[str, int, int], subprocess.Popen] = {}
    number = 0
    while waiting or running:
        while waiting and len(running) < arguments.parallel:
            cell = waiting.pop(0)
            command = [sys.executable, "-m", "bench.offpolicy", *sys.argv[1:], "--cell", cell[0], *map(str, cell[1:]),
                       "--cells", str(folder)]  # fmt: skip
            device = {"CUDA_VISIBLE_DEVICES": str(number % arguments.gpus)} if arguments.gpus > 1 else {}
            number += 1
            if not cell_file(folder, *cell).exists():
                running[cell] = subprocess.Popen(command, env=os.environ | device)
        for cell in [c for c, process in running.items() if process.poll() is not None]:
            if code := running.pop(cell).returncode:
                print(f"cell {cell} ended with {code}", flush=True)
        time.sleep(0.5)
    return read(arguments, folder)


def read(arguments: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """The cells that finished: table -> cell -> run -> figures."""
    found: dict[str, Any] = {}
    for table in arguments.table:
        for staleness in arguments.staleness:
            for minibatches in arguments.minibatches:
                file = cell_file(folder, table, staleness, minibatches)
                if file.exists():
                    cell = f"staleness {staleness}, minibatches {minibatches}"
                    found.setdefault(table, {})[cell] = json.loads(file.read_text())
    return found


def cell_file(folder: Path, table: str, staleness: int, minibatches: int) -> Path:
    return folder / f"{table}-{staleness}-{minibatches}.json"


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.offpolicy", description=__doc__)
    parser.add_argument("--table", nargs="+", default=["equal"], choices=["equal", "own"])
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=64)
    parser.add_argument("--staleness", type=int, nargs="+", default=list(STALENESS))
    parser.add_argument("--minibatches", type=int, nargs="+", default=list(MINIBATCHES))
    parser.add_argument("--parallel", type=int, default=1)
    parser.add_argument("--gpus", type=int, default=1)
    parser.add_argument("--device", choices=["cpu", "gpu"], default="cpu")
    parser.add_argument("--out", type=Path, default=Path("docs/results"))
    parser.add_argument("--cells", type=Path, default=None)
    parser.add_argument("--cell", nargs=3, default=None, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    settings = _settings(arguments)
    if arguments.cell:
        table, staleness, minibatches = arguments.cell[0], *map(int, arguments.cell[1:])
        found = run_cell(table, staleness, minibatches, arguments.seeds, settings)
        write_json(cell_file(arguments.cells, table, staleness, minibatches), without_nan(found))
        return 0
    from bench.offpolicy_report import report

    with tempfile.TemporaryDirectory() as folder:
        tables = run_all(arguments, arguments.cells or Path(folder))
    command = f"python -m bench.offpolicy {' '.join(sys.argv[1:])}".strip()
    report(tables, settings, command, _gpu(), arguments.out)
    cells = len(arguments.table) * len(arguments.staleness) * len(arguments.minibatches)
    return 0 if sum(len(cells) for cells in tables.values()) == cells else 1


def _gpu() -> str:
    import torch

    return torch.cuda.get_device_name() if torch.cuda.is_available() else f"{os.cpu_count()} cores, no GPU"


def _settings(arguments: argparse.Namespace) -> Settings:
    import rltk

    model = Path(rltk.__file__).parent / "models" / "tiny"
    return Settings(model=str(model), steps=arguments.steps, evaluate_every=8, noise_every=8, device=arguments.device)


if __name__ == "__main__":
    sys.exit(main())
