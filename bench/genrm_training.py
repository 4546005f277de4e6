"""`python -m bench.genrm_training --start S [--folder F] [--arms distance step_ratio] [key=value ...]`

A judge is trained: experiment=train_genrm from the warm start S (`python -m rltk.sft --config conf/sft_judge.yaml`) by
the judge's own reward, and once more by the share of steps judged right; then the judges before and after on the same
held-out solutions; and what policies that read nothing earn, exactly. Writes `--out`.json, .md and .png
(docs/results/genrm_training). Runs stay in `--folder` and are not run anew where they have finished. Keys go to all of
the training runs.
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
from collections.abc import Callable
from pathlib import Path
from statistics import fmean
from typing import Any

from rltk.compose import load
from rltk.files import write_json, write_text
from rltk.manifest import versions
from rltk.tasks import build_task
from rltk.tasks.judged import REWARD
from rltk.trajectory import Record

ARMS = {"distance": [], "step_ratio": ["task.reward=step_ratio", "steps=32"]}  # enough to see where it goes
PROBLEMS, SAMPLES = 300, 2
SUMMARY = ("wall_seconds", "steps", "tokens_sampled", "time_ledger", "config_hash")
FIGURES = ("f1", "precision", "recall", "index_right", "parse_fail")
COLOURS = {"distance": "#3ca951", "step_ratio": "#e4572e"}

# What a judge would say that knew the label (-1: sound) and the number of paragraphs.
POLICIES: dict[str, Callable[[int, int], int]] = {
    "every verdict and index right": lambda label, n: label,
    "every verdict right, the index one off": lambda label, n: label if label < 0 or n == 1 else abs(label - 1),
    "never flawed: reads nothing": lambda label, n: -1,
    "always the first paragraph": lambda label, n: 0,
    "always the last paragraph": lambda label, n: n - 1,
}


def train(name: str, keys: list[str], folder: Path) -> dict[str, Any]:
    """The run `name` under `folder`, which ends here if it has not before: its summary, and its curves."""
    run = folder / name
    if not (run / "summary.json").exists():
        _call(["rltk.train", "experiment=train_genrm", *keys, f"name={name}", f"output={folder}", "tracker=none",
               "resume=auto"])  # fmt: skip
    summary = json.loads((run / "summary.json").read_text())
    held_out = [{key: value for key, value in row.items() if key == "step" or "genrm/" in key} for row in _rows(run)]
    rewards = [[row["step"], row["reward/mean"]] for row in _rows(run, "metrics")]
    return {"keys": keys, **{key: summary.get(key) for key in SUMMARY}, "held_out": held_out, "reward": rewards}


def _rows(run: Path, name: str = "evaluations") -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / f"{name}.jsonl").read_text().splitlines()]


def judge(name: str, model: str, keys: list[str], folder: Path) -> dict[str, float]:
    """Figures of a judge on held-out solutions: of greedy replies, as in a run that has a judge, and of samples."""
    file = folder / f"{name}.evaluation.json"
    if not file.exists():
        _call(["rltk.evaluate", "experiment=train_genrm", f"model={model}", *keys, f"problems={PROBLEMS}",
               f"samples={SAMPLES}", f"output={folder}", f"name={name}"])  # fmt: skip
    return {key: value for key, value in json.loads(file.read_text()).items() if "genrm/" in key}


def _call(words: list[str]) -> None:
    print(" ".join(["python -m", *words]), flush=True)
    subprocess.run([sys.executable, "-m", *words], check=True, timeout=3 * 3600)


def enumerate_policies(records: list[Record]) -> dict[str, dict[str, float]]:
    """Mean reward of each kind, and F1 of "flawed", of each policy over the records: exact, no model is asked."""
    found = {}
    for name, policy in POLICIES.items():
        said = [policy(r.data["label"], r.data["paragraphs"]) for r in records]
        pairs = list(zip(said, records, strict=True))
        hits = sum(index >= 0 and r.data["flawed"] for index, r in pairs)
        called, flawed = sum(index >= 0 for index in said), sum(r.data["flawed"] for r in records)
        rewards = {
            kind: fmean(reward(i, r.data["label"], r.data["flawed"], r.data["paragraphs"]) for i, r in pairs)
            for kind, reward in REWARD.items()
        }
        found[name] = rewards | {"f1": 2 * hits / (called + flawed)}
    return found


def markdown(results: dict[str, Any]) -> list[str]:
    lines = [f"`{results['command']}`, {results['hardware']}", "",
             f"{PROBLEMS} held-out solutions, a third each sound, with a kind of error that training has, and with one "
             f"that it has not; greedy replies, and in brackets {SAMPLES} samples each at T = 1.", "",
             "| judge | F1 | precision | recall | index right | no verdict | F1, unseen kinds | recall, unseen kinds |",
             "|---|---|---|---|---|---|---|---|"]  # fmt: skip
    for name, figures in results["judges"].items():
        cells = [_cell(figures, key) for key in (*FIGURES, "f1/unseen", "recall/unseen")]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    lines += ["", "Recall by kind of error, greedy:", ""]
    kinds = sorted({key.rpartition("/")[2] for f in results["judges"].values() for key in f if "recall/kind/" in key})
    lines += [f"| judge | {' | '.join(kinds)} |", f"|---|{'---|' * len(kinds)}"]
    for name, figures in results["judges"].items():
        lines.append(
            f"| {name} | {' | '.join(_percent(figures.get(f'greedy/genrm/recall/kind/{k}')) for k in kinds)} |"
        )
    lines += ["", "What policies earn by each reward, on solutions as in training (exact):", "",
              "| policy | distance | outcome | step_ratio | F1 |", "|---|---|---|---|---|"]  # fmt: skip
    for name, row in results["policies"].items():
        lines.append(f"| {name} | {' | '.join(f'{row[key]:.3f}' for key in (*REWARD, 'f1'))} |")
    return [*lines, ""]


def _cell(figures: dict[str, float], key: str) -> str:
    greedy, sampled = (figures.get(f"{before}genrm/{key}") for before in ("greedy/", ""))
    return f"{_percent(greedy)} ({_percent(sampled)})"


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{value:.1%}"


def plot(path: Path, runs: dict[str, Any]) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (rewards, f1) = pyplot.subplots(1, 2, figsize=(9, 3.6), constrained_layout=True)
    for name, run in runs.items():
        style = {"color": COLOURS[name], "linewidth": 1.5}
        rewards.plot(*zip(*run["reward"], strict=True), label=name, **style)
        for key, dashes, words in (("greedy/genrm/f1", "-", "seen kinds"), ("greedy/genrm/f1/unseen", ":", "unseen")):
            points = [(row["step"], 100 * row.get(key, 0.0)) for row in run["held_out"]]
            f1.plot(
                *zip(*points, strict=True),
                linestyle=dashes,
                marker="o",
                markersize=3,
                label=f"{name}, {words}",
                **style,
            )
    rewards.set(title="reward of training samples", xlabel="training step")
    f1.set(title="F1 of “flawed”, held out, greedy", xlabel="training step", ylabel="%", ylim=(-2, 102))
    for axis in (rewards, f1):
        axis.grid(alpha=0.25)
        axis.spines[["top", "right"]].set_visible(False)
        axis.legend(frameon=False, loc="lower right")
    figure.savefig(path, dpi=130)
    pyplot.close(figure)


def write(out: Path, results: dict[str, Any]) -> None:
    write_json(out.with_suffix(".json"), results)
    write_text(out.with_suffix(".md"), "\n".join(markdown(results)))
    if results["runs"]:
        plot(out.with_suffix(".png"), results["runs"])


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.genrm_training", description=__doc__)
    parser.add_argument("--start", required=True, help="the warm start's folder")
    parser.add_argument("--folder", type=Path, default=None, help="of the runs; a new temporary one if not given")
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=list(ARMS))
    parser.add_argument(
        "--out", type=Path, default=Path("docs/results/genrm_training"), help="files, less their endings"
    )
    parser.add_argument("keys", nargs="*")
    arguments = parser.parse_args()
    began = time.perf_counter()
    task: Any = build_task(load(["experiment=train_genrm"]).task)
    with tempfile.TemporaryDirectory() as temporary:
        folder = (arguments.folder or Path(temporary)).resolve()
        results: dict[str, Any] = {
            "command": f"python -m bench.genrm_training {' '.join(sys.argv[1:])}".strip(),
            "hardware": f"{platform.machine()}, {os.cpu_count()} cores", "versions": versions(),
            "policies": enumerate_policies([task.problem(index) for index in range(2000)]),
            "judges": {}, "runs": {},
        }  # fmt: skip
        for arm in arguments.arms:
            keys = [f"model={arguments.start}", *ARMS[arm], *arguments.keys]
            results["runs"][arm] = train(f"judge-{arm}", keys, folder)
            write(arguments.out, results)
        judges = {"warm start": arguments.start} | {
            f"trained by {a}": str(folder / f"judge-{a}" / "model") for a in ARMS
        }
        for name, model in judges.items():
            if name == "warm start" or name.rpartition(" ")[2] in arguments.arms:
                results["judges"][name] = judge(name.replace(" ", "-"), model, arguments.keys, folder)
                write(arguments.out, results)
    print("\n".join(markdown(results)))
    header = {key: results[key] for key in ("hardware", "versions", "command")}
    figures = {key: results[key] for key in ("judges", "policies")} | {"seconds": time.perf_counter() - began}
    print(json.dumps({"bench": "genrm_training", **header, "figures": figures}))


if __name__ == "__main__":
    main()
