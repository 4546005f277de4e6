"""Results of bench.kv_learning: one JSON file with a section for the lab and one for the road, tables and plots."""

from __future__ import annotations

import json
import os
import platform
import statistics
import subprocess
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rltk.files import write_text
from rltk.lab.arm import Settings

COLOURS = {
    "grpo": "#4269d0", "grpo + sparse": "#efb118", "grpo + prefix_min": "#ff725c", "ctpo": "#3ca951",
    "minpro": "#6cc5b0", "ctpo own": "#a463f2",
}  # fmt: skip
FULL = "#20262e"  # the full cache's grpo, drawn into every panel
T95 = {1: 12.71, 2: 4.303, 3: 3.182, 4: 2.776, 5: 2.571, 6: 2.447, 7: 2.365, 8: 2.306, 9: 2.262}  # Student, two-sided
Runs = dict[str, dict[str, Any]]  # run -> figures


def report(cells: dict[int, Any], settings: Settings, command: str, out: Path) -> None:
    """Section `lab` of kv_learning.json (every run), kv_learning.md (means), kv_learning_lab.png."""
    common = {key: value for key, value in asdict(settings).items() if key not in ("model", "kv")}
    lab = {
        "command": command, **{key: next(iter(cells.values()))[key] for key in ("hardware", "versions")},
        "settings": common,
        "seconds": {f"{c} %": cell["seconds"] for c, cell in cells.items()},
        "steps": {f"{c} %": cell["steps"] for c, cell in cells.items()},
        "summary": {f"{c} %": summary(c, cells) for c in sorted(cells)},
        "runs": {f"{c} %, {name}": run for c, cell in sorted(cells.items()) for name, run in cell["runs"].items()},
    }  # fmt: skip
    put_section(out / "kv_learning.json", "lab", lab)
    write_text(out / "kv_learning.md", "\n".join(markdown(cells)) + "\n")
    plot(out / "kv_learning_lab.png", cells)
    print(json.dumps({"bench": "kv_learning", **{k: v for k, v in lab.items() if k != "runs"}}))


def hardware() -> str:
    query = ["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"]
    there = Path("/dev/nvidia0").exists() or Path("/dev/nvidiactl").exists()
    found = subprocess.run(query, capture_output=True, text=True).stdout.split("\n") if there else ["no GPU"]
    gpu = ", ".join(name for name in found if name)
    return f"{platform.machine()}, {os.cpu_count()} cores, {gpu}"


def section(file: Path, name: str) -> dict[str, Any]:
    return json.loads(file.read_text()).get(name, {}) if file.exists() else {}


def put_section(file: Path, name: str, value: dict[str, Any]) -> None:
    """Replace one section and leave the others; a line a run."""
    whole = (json.loads(file.read_text()) if file.exists() else {}) | {name: value}
    write_text(file, _lines(whole, 0) + "\n")


def _lines(value: Any, depth: int) -> str:
    """JSON, floats in five digits, a line for what has no mapping of mappings in it."""
    deep = isinstance(value, dict) and any(isinstance(v, dict) and depth < 4 for v in value.values())
    if not deep or (depth and "curve" in value):
        return json.dumps(_short(value), allow_nan=False)
    pad = " " * (depth + 1)
    parts = (f"{pad}{json.dumps(str(k))}: {_lines(v, depth + 1)}" for k, v in value.items())
    return "{\n" + ",\n".join(parts) + "\n" + " " * depth + "}"


def _short(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _short(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_short(item) for item in value]
    return float(f"{value:.5g}") if isinstance(value, float) else value


def arm_of(run: str) -> str:
    return run.rsplit("-", 1)[0]


def summary(compression: int, cells: dict[int, Any]) -> dict[str, Any]:
    """By arm: means over seeds, and the differences to the full cache's grpo and to the uncorrected one, after as many
    steps.

    A difference is [mean, low, high]: Student's 95 % interval over seeds, paired, as a seed draws the same problems.
    """
    runs, found = cells[compression]["runs"], {}
    for arm in COLOURS:
        mine = {name: run for name, run in runs.items() if arm_of(name) == arm}
        if not mine:
            continue
        finals = [run["final"] for run in mine.values()]
        means = {key: _mean([run[key] for run in mine.values()]) for key in
                 ("final", "best", "greedy", "flawed", "sampled", "dropped", "unsupported", "tail_per_1k", "clipped",
                  "alarms")}  # fmt: skip
        positions = list(dict.fromkeys(p for run in mine.values() for p in run["tail_by_position"]))
        tails = {p: _mean([run["tail_by_position"].get(p) for run in mine.values()]) for p in positions}
        found[arm] = means | {
            "final_sd": statistics.stdev(finals) if len(finals) > 1 else None,
            "collapsed": sum(run["collapsed"] for run in mine.values()), "runs": len(mine), "tail_by_position": tails,
            "over_full": difference(mine, cells.get(0, {}).get("runs", {}), "grpo") if compression else None,
            "over_uncorrected": difference(mine, runs, "grpo") if compression and arm != "grpo" else None,
        }  # fmt: skip
    return found


def difference(mine: Runs, others: Runs, other: str) -> list[float] | None:
    gaps = []
    for name, run in mine.items():
        beside = others.get(f"{other}-{name.rsplit('-', 1)[1]}")
        if beside is not None:
            gaps.append(run["final"] - _at(beside, run["curve"]["step"][-1]))
    if len(gaps) - 1 not in T95:
        return None
    half = T95[len(gaps) - 1] * statistics.stdev(gaps) / len(gaps) ** 0.5
    mean = statistics.fmean(gaps)
    return [mean, mean - half, mean + half]


def _at(run: dict[str, Any], step: int) -> float:
    """Accuracy after `step`, as the other may have been cut there; at the end, if it was not evaluated then."""
    by_step = dict(zip(run["curve"]["step"], run["curve"]["accuracy"], strict=True))
    return by_step.get(step, run["final"])


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return statistics.fmean(known) if known else None


def markdown(cells: dict[int, Any]) -> list[str]:
    lines = []
    for compression in sorted(cells):
        cell, table = cells[compression], summary(compression, cells)
        name = f"{compression} % compression" if compression else "full cache"
        lines += [f"### {name}, {cell['steps']} training steps", ""]
        lines += ["| arm | final | own cache | against full grpo | against grpo + none | collapsed | dropped "
                  "| clipped | tail, tokens in 1 000 | unsupported | alarms |", "|" + "---|" * 11]  # fmt: skip
        for arm, row in table.items():
            spread = f" ± {100 * row['final_sd']:.1f}" if row["final_sd"] is not None else ""
            lines.append(
                f"| {arm} | {100 * row['final']:.1f}{spread} % | {_percent(row['sampled'])} | {_gap(row['over_full'])} "
                f"| {_gap(row['over_uncorrected'])} | {row['collapsed']} of {row['runs']} | {_percent(row['dropped'])} "
                f"| {_percent(row['clipped'])} | {_number(row['tail_per_1k'])} | {_percent(row['unsupported'])} "
                f"| {_number(row['alarms'])} |"
            )
        positions = list(dict.fromkeys(p for row in table.values() for p in row["tail_by_position"]))
        lines += ["", f"| 5th percentile of min(xi, 1/xi) at tokens | {' | '.join(positions)} |",
                  "|" + "---|" * (1 + len(positions))]  # fmt: skip
        for arm, row in table.items():
            tails = (row["tail_by_position"].get(p) for p in positions)
            lines.append(f"| {arm} | {' | '.join('' if t is None else f'{t:.2g}' for t in tails)} |")
        lines.append("")
    return lines


def plot(path: Path, cells: dict[int, Any]) -> None:
    """A column a compression: held-out accuracy, accuracy of its own samples, tail. Means, and bands over the seeds."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    columns = [c for c in sorted(cells) if c] or sorted(cells)
    figure, axes = pyplot.subplots(3, len(columns), figsize=(5.4 * len(columns), 8.4), sharex=True, sharey="row",
                                   constrained_layout=True, squeeze=False)  # fmt: skip
    full = cells.get(0, {}).get("runs", {})
    for column, compression in enumerate(columns):
        runs = cells[compression]["runs"]
        lines = [(arm, arm, colour, runs) for arm, colour in COLOURS.items()]
        for arm, label, colour, source in [("grpo", "grpo, full cache", FULL, full), *lines]:
            mine = [run for name, run in source.items() if arm_of(name) == arm]
            if not mine:
                continue
            style = "--" if source is full else "-"
            held_out = [run["curve"]["accuracy"] for run in mine]
            _draw(axes[0][column], mine[0]["curve"]["step"], held_out, 100, colour, style, label)
            trained = list(range(1, 1 + len(mine[0]["steps"]["sampled"])))
            smooth = [_smoothed(run["steps"]["sampled"]) for run in mine]
            _draw(axes[1][column], trained, smooth, 100, colour, style, label)
            _draw(axes[2][column], trained, [run["steps"]["tail"] for run in mine], 1, colour, style, label)
        axes[0][column].set_title(f"{compression} % compression" if compression else "full cache", fontsize=10)
        axes[2][column].set_xlabel("training step")
    titles = ("held-out avg@4 with the full cache, %", "training samples that are right, %\n(own cache, 5-step mean)",
              "5th percentile of min(ξ, 1/ξ)\nin the worst 100 positions")  # fmt: skip
    for row, title in zip(axes, titles, strict=True):
        row[0].set_ylabel(title)
        for axis in row:
            axis.grid(alpha=0.25)
            axis.spines[["top", "right"]].set_visible(False)
    axes[0][0].legend(frameon=False, fontsize=8)
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def _draw(
    axis: Any, x: list[int], curves: list[list[float | None]], scale: float, colour: str, style: str, label: str
) -> None:
    points = [[scale * v for v in column if v is not None] for column in zip(*curves, strict=True)]
    known = [(at, values) for at, values in zip(x, points, strict=True) if values]
    if known:
        at = [place for place, _ in known]
        axis.fill_between(at, [min(v) for _, v in known], [max(v) for _, v in known], color=colour, alpha=0.1, lw=0)
        axis.plot(at, [statistics.fmean(v) for _, v in known], style, color=colour, label=label, linewidth=1.6)


def _smoothed(values: list[float | None], width: int = 5) -> list[float | None]:
    return [_mean(values[max(0, i + 1 - width) : i + 1]) for i in range(len(values))]


def _gap(gap: list[float] | None) -> str:
    return "" if gap is None else f"{100 * gap[0]:+.1f} [{100 * gap[1]:+.1f}, {100 * gap[2]:+.1f}]"


def _percent(value: float | None) -> str:
    return "" if value is None else f"{100 * value:.1f} %"


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.1f}"
