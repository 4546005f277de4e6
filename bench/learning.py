"""`python -m bench.learning [--parallel N] [--seeds 0 1 2] [--runs NAME ...] [key=value ...]`: the default run learns?

ctpo and grpo at the same hyper-parameters, several seeds, and a control whose rewards are shuffled across groups (it
must not gain). Writes `--out`.json and .png (docs/results/learning) as runs end, and prints a table.
Runs share the machine if `--parallel` is over 1; on one GPU give each its share, as in rollout.gpu_memory_share=0.08.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from bench.offpolicy_report import COLOURS
from rltk.files import write_json
from rltk.manifest import versions

ARMS = ("ctpo", "grpo")
CONTROL = {"permuted": ["algorithm=ctpo", "debug.permute_rewards=true"]}
KEPT = ("final_accuracy", "final_greedy", "initial_accuracy", "initial_greedy", "initial_flawed", "final_flawed")


def commands(arms: list[str], seeds: list[int], extra: list[str], folder: Path) -> dict[str, list[str]]:
    """name -> command. The control runs with the first seed alone, and only beside the default arms."""
    jobs = {f"{arm}-s{s}": [f"algorithm={arm}", f"seed={s}"] for s in seeds for arm in arms}
    if arms == list(ARMS):
        jobs |= {f"{arm}-s{seeds[0]}": [*keys, f"seed={seeds[0]}"] for arm, keys in CONTROL.items()}
    start = [sys.executable, "-m", "rltk.train"]
    return {n: [*start, *keys, *extra, f"name={n}", f"output={folder}", "tracker=none"] for n, keys in jobs.items()}


def run_all(
    jobs: dict[str, list[str]], parallel: int, folder: Path, out: Path, header: dict[str, Any]
) -> dict[str, Any]:
    """Run the jobs, `parallel` at a time, a quarter of a minute apart; write the results after each.

    Returns the results of the runs that finished, and of those that the file in `out` had of before.
    """
    waiting, running, done = list(jobs), {}, earlier(out)
    while waiting or running:
        if waiting and len(running) < parallel:
            name = waiting.pop(0)
            log = open(folder / f"{name}.log", "w")  # noqa: SIM115
            running[name] = subprocess.Popen(jobs[name], stdout=log, stderr=subprocess.STDOUT)
            time.sleep(15 if parallel > 1 else 0)
        for name in [n for n, process in running.items() if process.poll() is not None]:
            code = running.pop(name).returncode
            if code:
                print(f"{name} ended with {code}:\n{(folder / f'{name}.log').read_text()[-2000:]}", flush=True)
                continue
            done[name] = result(folder / name)
            write(out, header, done)
            figures = {key: done[name][key] for key in KEPT if done[name][key] is not None} | {
                k: v for k, v in done[name]["final_levels"].items() if v is not None
            }
            print(f"{name:14}", " ".join(f"{key} {value:.1%}" for key, value in figures.items()), flush=True)
        time.sleep(1)
    return done


def earlier(out: Path) -> dict[str, Any]:
    file = out.with_suffix(".json")
    return json.loads(file.read_text())["runs"] if file.exists() else {}


def result(folder: Path) -> dict[str, Any]:
    summary = json.loads((folder / "summary.json").read_text())
    evaluations = [json.loads(line) for line in (folder / "evaluations.jsonl").read_text().splitlines()]
    kept = {key: summary[key] for key in (*KEPT, "final_levels", "means", "wall_seconds", "steps", "config_hash")}
    names = ("step", "avg@4", "avg@4_ci", "greedy", "flawed")
    curve = [{k: row.get(k) for k in names} | {"levels": {n: v["avg@4"] for n, v in row.get("levels", {}).items()}}
             for row in evaluations]  # fmt: skip
    return kept | {"curve": curve}


def write(out: Path, header: dict[str, Any], runs: dict[str, Any]) -> None:
    write_json(out.with_suffix(".json"), header | {"runs": dict(sorted(runs.items()))})
    plot(out.with_suffix(".png"), runs)


def plot(path: Path, runs: dict[str, Any]) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    colours = COLOURS | {"permuted": "#8a8f98"}
    figure, axes = pyplot.subplots(1, 3, figsize=(13, 3.8), sharex=True, constrained_layout=True)
    panels = {"avg@4": "avg@4, held out", "greedy": "greedy, held out", "flawed": "flawed among right answers"}
    for axis, (key, title) in zip(axes, panels.items(), strict=True):
        labelled = set()
        for name, run in sorted(runs.items()):
            arm = name.rsplit("-", 1)[0]
            points = [(row["step"], 100 * row[key]) for row in run["curve"] if row[key] is not None]
            axis.plot(*zip(*points, strict=True), color=colours[arm], marker="o", markersize=3, linewidth=1.5,
                      label=None if arm in labelled else arm)  # fmt: skip
            labelled.add(arm)
        axis.set(title=title, xlabel="training step", ylim=(-2, 102))
        axis.set_ylabel("%")
        axis.grid(alpha=0.25)
        axis.spines[["top", "right"]].set_visible(False)
    axes[0].legend(frameon=False)
    figure.savefig(path, dpi=130)
    pyplot.close(figure)


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.learning", description=__doc__)
    parser.add_argument("--parallel", type=int, default=1)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--runs", nargs="+", default=None, help="only these, e.g. grpo-s1; the file keeps the others")
    parser.add_argument("--arms", nargs="+", default=list(ARMS), help="objectives")
    parser.add_argument("--out", type=Path, default=Path("docs/results/learning"), help="files, less their endings")
    parser.add_argument("keys", nargs="*")
    arguments = parser.parse_args()
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    header = {
        "command": f"python -m bench.learning {' '.join(sys.argv[1:])}".strip(),
        "hardware": f"{platform.machine()}, {os.cpu_count()} cores, {_gpu()}",
        "versions": versions(),
    }
    with tempfile.TemporaryDirectory() as folder:
        jobs = commands(arguments.arms, arguments.seeds, arguments.keys, Path(folder))
        jobs = {name: job for name, job in jobs.items() if arguments.runs is None or name in arguments.runs}
        if arguments.runs is None:  # all of them anew
            arguments.out.with_suffix(".json").unlink(missing_ok=True)
        done = run_all(jobs, arguments.parallel, Path(folder), arguments.out, header)
    figures = {name: {key: run[key] for key in KEPT} for name, run in sorted(done.items())}
    print(json.dumps({"bench": "learning", **header, "figures": figures}))
    return 0 if set(jobs) <= set(done) else 1


def _gpu() -> str:
    listing = (
        subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True) if Path("/dev/nvidia0").exists() else None
    )
    return listing.stdout.split("(")[0].strip() if listing else "no GPU"


if __name__ == "__main__":
    sys.exit(main())
