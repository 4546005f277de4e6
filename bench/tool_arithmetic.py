"""`python -m bench.tool_arithmetic [--only tool,after] [--seeds 0] [key=value ...]`: does a model learn to use a tool?

experiment=tool_arithmetic and the same run without the tool; then ATTC and DTSR, on and off, in evaluations of the
model before and after (same problems, same seeds: differences are taken problem by problem). Writes `--out`.json, .md
and .png (docs/results/tool_arithmetic). Runs stay in `--folder`, the trained model with them, and are not run anew
where they have finished; what `--only` leaves out stays as `--out`.json has it. Keys go to all of the training runs.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from rltk.files import write_json, write_text
from rltk.manifest import versions

ARMS = {"tool": [], "no-tool": ["tools=none"]}
PARTS = [*ARMS, "before", "after"]
# The model's whole response is thought until its answer mark, and one call is about 40 tokens.
DTSR = ["dtsr.mode=eval", "dtsr.opens=''", "dtsr.signals=[Wait]", "dtsr.gap_tokens=16", "dtsr.reply_tokens=8"]
INTERVENTIONS = {"off": [], "ATTC": ["attc.mode=eval"], "DTSR": DTSR, "both": ["attc.mode=eval", *DTSR]}
PROBLEMS, SAMPLES = 256, 4
PATIENCE = ["deadlines.start=1800", "deadlines.rollout=3600"]  # seconds: other work beside it costs time, no figures
SUMMARY = ("initial_accuracy", "final_accuracy", "initial_greedy", "final_greedy", "wall_seconds", "steps",
           "time_ledger", "config_hash")  # fmt: skip
CURVE = ("step", "avg@4", "avg@4_ci", "greedy", "length", "tools/used", "tools/calls")
NOTED = ("attc/trust", "attc/confidence", "dtsr/checks", "dtsr/closed", "dtsr/parse_failures", "dtsr/asked_tokens",
         "tools/calls", "tools/ignored", "control/tokens", "tools/tokens")  # fmt: skip


def train(name: str, keys: list[str], folder: Path) -> dict[str, Any]:
    """The run `name` under `folder`, which ends here if it has not before: its summary, and its held-out curve."""
    run = folder / name
    if not (run / "summary.json").exists():
        command = [sys.executable, "-m", "rltk.train", "experiment=tool_arithmetic", *keys]
        _call([*command, f"name={name}", f"output={folder}", "tracker=none", "resume=auto"])
    else:
        print(f"{run} has finished and is not run anew", flush=True)
    summary = json.loads((run / "summary.json").read_text())
    rows = [json.loads(line) for line in (run / "evaluations.jsonl").read_text().splitlines()]
    levels = {level: row["avg@4"] for level, row in rows[-1]["levels"].items()}
    calls = {key: value for key, value in rows[-1].items() if key.startswith("tools/")}
    curve = [{key: row[key] for key in CURVE if key in row} for row in rows]
    return {
        "keys": keys,
        **{key: summary.get(key) for key in SUMMARY},
        "levels": levels,
        "calls": calls,
        "curve": curve,
    }


def parts(written: str) -> list[str]:
    chosen = written.split(",")
    if unknown := [part for part in chosen if part not in PARTS]:
        raise argparse.ArgumentTypeError(f"{', '.join(unknown)}: the parts are {', '.join(PARTS)}")
    return chosen


def intervene(model: Path, name: str, folder: Path) -> dict[str, dict[str, Any]]:
    """Figures of each intervention on the same problems and seeds; `against off`: differences, by problem."""
    if name == "after" and not (model / "config.json").exists():
        raise SystemExit(f"there is no trained model in {model}; train it with --only tool,after")
    rows: dict[str, list[dict[str, Any]]] = {}
    found: dict[str, dict[str, Any]] = {}
    for arm, keys in INTERVENTIONS.items():
        place = f"{name}-{arm}"
        if not (folder / f"{place}.evaluation.json").exists():
            command = [sys.executable, "-m", "rltk.evaluate", "experiment=tool_arithmetic", f"model={model}", *keys,
                       *PATIENCE]  # fmt: skip
            _call([*command, f"problems={PROBLEMS}", f"samples={SAMPLES}", "greedy=false", f"output={folder}",
                   f"name={place}"])  # fmt: skip
        figures = json.loads((folder / f"{place}.evaluation.json").read_text())
        rows[arm] = [json.loads(line) for line in (folder / f"{place}.samples.jsonl").read_text().splitlines()]
        accuracy = f"avg@{SAMPLES}"
        found[arm] = {
            "accuracy": figures[accuracy], "accuracy_ci": figures[f"{accuracy}_ci"],
            "tokens": interval(_by_problem(rows[arm], "tokens")),
            **{key: figures[key] for key in NOTED if key in figures},
        }  # fmt: skip
        if arm != "off":
            found[arm]["against off"] = {key: difference(rows[arm], rows["off"], key) for key in ("correct", "tokens")}
    return found


def _call(command: list[str]) -> None:
    print(" ".join(["python", *command[1:]]), flush=True)
    subprocess.run(command, check=True, timeout=3 * 3600)


def _by_problem(rows: list[dict[str, Any]], key: str) -> dict[str, float]:
    values: dict[str, list[float]] = {}
    for row in rows:
        if row[key] is not None:
            values.setdefault(row["prompt_id"], []).append(float(row[key]))
    return {problem: statistics.fmean(each) for problem, each in values.items()}


def interval(values: dict[str, float]) -> list[float]:
    """[mean, low, high], 95 %, problems being independent."""
    each = list(values.values())
    half = 1.96 * statistics.stdev(each) / math.sqrt(len(each))
    mean = statistics.fmean(each)
    return [mean, mean - half, mean + half]


def difference(rows: list[dict[str, Any]], off: list[dict[str, Any]], key: str) -> list[float]:
    with_it, without = _by_problem(rows, key), _by_problem(off, key)
    return interval({problem: with_it[problem] - without[problem] for problem in with_it.keys() & without.keys()})


def write(out: Path, results: dict[str, Any]) -> None:
    write_json(out.with_suffix(".json"), results)
    write_text(out.with_suffix(".md"), "\n".join(markdown(results)))
    plot(out.with_suffix(".png"), results["runs"])


def markdown(results: dict[str, Any]) -> list[str]:
    lines = [f"`{results['command']}`, {results['hardware']}", "",
             "| run | avg@4 before | after | greedy after | tool use before | after | minutes |",
             "|---|---|---|---|---|---|---|"]  # fmt: skip
    for name, run in results["runs"].items():
        first, last = run["curve"][0], run["curve"][-1]
        used = [f"{row['tools/used']:.1%}" if "tools/used" in row else "-" for row in (first, last)]
        lines.append(f"| {name} | {first['avg@4']:.1%} | {last['avg@4']:.1%} | {last['greedy']:.1%} | {used[0]} | "
                     f"{used[1]} | {run['wall_seconds'] / 60:.1f} |")  # fmt: skip
    lines += ["", f"{PROBLEMS} held-out problems, {SAMPLES} samples each at T = 1, 95 % intervals; differences against "
              "off are of the same problems.", "",
              "| model | intervention | accuracy | difference, points | sampled tokens | difference | it did |",
              "|---|---|---|---|---|---|---|"]  # fmt: skip
    for model, arms in results["interventions"].items():
        for arm, found in arms.items():
            low, high = found["accuracy_ci"]
            accuracy = f"{found['accuracy']:.1%} ({low:.1%} to {high:.1%})"
            against = found.get("against off")
            points = _signed([100 * value for value in against["correct"]]) if against else "-"
            tokens = _signed(against["tokens"]) if against else "-"
            mean, low, high = found["tokens"]
            sampled = f"{mean:.1f} ({low:.1f} to {high:.1f})"
            lines.append(f"| {model} | {arm} | {accuracy} | {points} | {sampled} | {tokens} | {_did(found)} |")
    return [*lines, ""]


def _did(found: dict[str, Any]) -> str:
    said = {"attc/trust": "trusted {:.1%} of the turns with calls", "dtsr/closed": "closed {:.1%} of the responses"}
    return ", ".join(words.format(found[key]) for key, words in said.items() if key in found) or "-"


def _signed(interval: list[float]) -> str:
    mean, low, high = interval
    return f"{mean:+.1f} ({low:+.1f} to {high:+.1f})"


def plot(path: Path, runs: dict[str, Any]) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 2, figsize=(9, 3.6), sharex=True, constrained_layout=True)
    for axis, (key, title) in zip(
        axes, {"avg@4": "accuracy", "tools/used": "responses with a call"}.items(), strict=True
    ):
        for name, run in runs.items():
            points = [(row["step"], 100 * row.get(key, 0.0)) for row in run["curve"]]
            colour = "#3ca951" if name.startswith("tool") else "#8a8f98"
            axis.plot(*zip(*points, strict=True), color=colour, marker="o", markersize=3, linewidth=1.5, label=name)
        axis.set(title=f"{title}, held out", xlabel="training step", ylabel="%", ylim=(-2, 102))
        axis.grid(alpha=0.25)
        axis.spines[["top", "right"]].set_visible(False)
    axes[0].legend(frameon=False)
    figure.savefig(path, dpi=130)
    pyplot.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.tool_arithmetic", description=__doc__)
    parser.add_argument("--folder", type=Path, default=Path("runs/tool_arithmetic"), help="of the runs and evaluations")
    parser.add_argument("--only", type=parts, default=PARTS, help=f"some of {','.join(PARTS)}")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument(
        "--out", type=Path, default=Path("docs/results/tool_arithmetic"), help="files, less their endings"
    )
    parser.add_argument("keys", nargs="*")
    arguments = parser.parse_args()
    start, folder = time.perf_counter(), arguments.folder.resolve()
    known = arguments.out.with_suffix(".json")
    earlier = json.loads(known.read_text()) if known.exists() and set(arguments.only) != set(PARTS) else {}
    command = f"python -m bench.tool_arithmetic {' '.join(sys.argv[1:])}".strip()
    results: dict[str, Any] = {
        "command": command, "hardware": f"{platform.machine()}, {os.cpu_count()} cores", "versions": versions(),
        "commands": earlier.get("commands", {}) | dict.fromkeys(arguments.only, command),  # of each part, the last one
        "runs": earlier.get("runs", {}), "interventions": earlier.get("interventions", {}),
    }  # fmt: skip
    for seed in arguments.seeds:
        for arm, keys in ARMS.items():
            if arm in arguments.only:
                every = [*keys, *arguments.keys, f"seed={seed}"]
                results["runs"][f"{arm.replace('-', ' ')}, seed {seed}"] = train(f"{arm}-s{seed}", every, folder)
                write(arguments.out, results)
    trained = folder / f"tool-s{arguments.seeds[0]}" / "model"
    for name, model in {"before": Path("tiny_tool"), "after": trained}.items():
        if name in arguments.only:
            results["interventions"][name] = intervene(model, name, folder)
            write(arguments.out, results)
    print("\n".join(markdown(results)))
    runs = {name: {"initial_accuracy": run["initial_accuracy"], "final_accuracy": run["final_accuracy"],
                   "initial_tool_use": run["curve"][0].get("tools/used"), "wall_seconds": run["wall_seconds"],
                   "final_tool_use": run["curve"][-1].get("tools/used")}
            for name, run in results["runs"].items()}  # fmt: skip
    header = {key: results[key] for key in ("hardware", "versions", "command")}
    figures = {"runs": runs, "interventions": results["interventions"], "seconds": time.perf_counter() - start}
    print(json.dumps({"bench": "tool_arithmetic", **header, "figures": figures}))


if __name__ == "__main__":
    main()
