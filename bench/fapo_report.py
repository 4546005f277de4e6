"""Results of bench.fapo: figures on top of fapo.json, tables in fapo.md, curves in fapo.png."""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from bench.kv_learning_report import put_section
from bench.offpolicy_report import COLOURS
from rltk.files import write_text

COLOUR = {"fapo": COLOURS["fapo"], "grpo": COLOURS["grpo"], "judged": "#efb118"}
LABELS = {"fapo": "fapo", "grpo": "grpo", "judged": "fapo, labels as wrong as the judge's"}
SMOOTH = 5  # steps
FEW = 8  # steps, at either end of a run
SECTIONS = (("road", "avg@4"), ("lab", "accuracy"), ("lab_alarms", "accuracy"))  # and what is its accuracy there
Runs = dict[str, dict[str, Any]]


def report(file: Path) -> None:
    whole = json.loads(file.read_text())
    figures = {}
    for where, key in SECTIONS:
        runs = whole.get(where, {}).get("runs", {})
        figures |= {f"{where}_{name}": value for name, value in summary(runs, key).items()}
    figures |= judge(whole.get("road", {}).get("runs", {}))
    put_section(file, "figures", figures)
    write_text(file.with_suffix(".md"), "\n".join(markdown(whole, figures)) + "\n")
    plot(file.with_suffix(".png"), whole)
    print(json.dumps({"bench": "fapo", "figures": figures}), flush=True)


def arms(runs: Runs) -> dict[str, list[dict[str, Any]]]:
    found: dict[str, list[dict[str, Any]]] = {}
    for name, run in sorted(runs.items()):
        found.setdefault(name.rpartition("-")[0], []).append(run)
    return found


def summary(runs: Runs, key: str) -> dict[str, float]:
    """Means over seeds of the last evaluation, and fapo's (or `judged`'s) against grpo's."""
    found: dict[str, float] = {}
    for arm, mine in arms(runs).items():
        found[f"{arm}_accuracy"] = statistics.fmean(run["curve"][-1][key] for run in mine)
        found[f"{arm}_flawed"] = statistics.fmean(run["curve"][-1]["flawed"] or 0.0 for run in mine)
        found[f"{arm}_seeds"] = len(mine)
    for arm in ("fapo", "judged"):
        if f"{arm}_accuracy" in found and "grpo_accuracy" in found:
            found[f"{arm}_accuracy_over_grpo"] = found[f"{arm}_accuracy"] - found["grpo_accuracy"]
            if found["grpo_flawed"]:
                found[f"{arm}_flawed_over_grpo"] = found[f"{arm}_flawed"] / found["grpo_flawed"]
    return found


def judge(runs: Runs) -> dict[str, float]:
    """Of the judge on the road's held-out problems, mean over seeds, before and after training; the share of flawed
    answers with a positive advantage, early and late; and `switch` of each run."""
    mine = arms(runs).get("fapo", [])
    found: dict[str, float] = {}
    for which, at in (("before", 0), ("after", -1)):
        for name in ("precision", "recall", "f1"):
            values = [
                run["judge"][at][f"genrm/{name}"] for run in mine if run["judge"][at].get(f"genrm/{name}") is not None
            ]
            found |= {f"judge_{name}_{which}": statistics.fmean(values)} if values else {}
    for which, part in (("first", slice(None, FEW)), ("last", slice(-FEW, None))):
        shares = [run["train"].get("advantage/flawed_positive", [])[part] for run in mine]
        known = [share for run in shares for share in run if share is not None]
        found |= {f"flawed_gaining_{which}_{FEW}_steps": statistics.fmean(known)} if known else {}
    rates = [rate for run in mine if (rate := alarms(run["train"])) is not None]
    found |= {"judge_alarm_in_training": statistics.fmean(rates)} if rates else {}
    found |= {f"switch_step_s{n}": step for n, run in enumerate(mine) if (step := switch(run)) is not None}
    return found


def alarms(train: dict[str, list[float | None]]) -> float | None:
    """Share of the sound right answers of all steps that the judge called flawed."""
    false = sound = 0.0
    names = ("accuracy", "genrm/flawed", "genrm/precision", "genrm/rule_flawed")
    for right, called, precision, flawed in zip(*(train.get(name, []) for name in names), strict=False):
        false += (right or 0.0) * (called or 0.0) * (1 - (precision or 0.0))
        sound += (right or 0.0) * (1 - (flawed or 0.0))
    return false / sound if sound else None


def switch(run: dict[str, Any]) -> int | None:
    """The first step from which on the smoothed share of flawed answers with a positive advantage is under a tenth: the
    switching point is behind nearly every problem that still meets a flawed answer."""
    curve = smoothed(run["train"].get("advantage/flawed_positive", []))
    above = [step for step, share in curve if share >= 0.1]
    later = [step for step, _ in curve if not above or step > above[-1]]
    return later[0] if later else None


def smoothed(values: Sequence[float | None]) -> list[tuple[int, float]]:
    """(step from 1, mean over the last SMOOTH steps that have a value)."""
    known = [(step, value) for step, value in enumerate(values, 1) if value is not None]
    return [
        (step, statistics.fmean(v for _, v in known[max(0, i - SMOOTH + 1) : i + 1]))
        for i, (step, _) in enumerate(known)
    ]


def markdown(whole: dict[str, Any], figures: dict[str, Any]) -> list[str]:
    lines = ["# FAPO with a judge, against GRPO", ""]
    for where, key in SECTIONS:
        part = whole.get(where, {})
        if not part:
            continue
        lines += [
            f"`{part['command']}`, {part['hardware']}.",
            "",
            "| run | accuracy before | after | greedy | flawed before | after |",
        ]
        lines += ["|---|---|---|---|---|---|"]
        for name, run in sorted(part["runs"].items()):
            first, last = run["curve"][0], run["curve"][-1]
            cells = [first[key], last[key], last["greedy"], first["flawed"], last["flawed"]]
            lines.append(f"| {name} | {' | '.join(_percent(cell) for cell in cells)} |")
        lines.append("")
    lines += ["| figure | |", "|---|---|"]
    lines += [
        f"| {name} | {value:.3f} |" if isinstance(value, float) else f"| {name} | {value} |"
        for name, value in figures.items()
    ]
    return lines


def _percent(value: float | None) -> str:
    return "" if value is None else f"{value:.1%}"


def plot(path: Path, whole: dict[str, Any]) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 5, figsize=(20, 3.8), constrained_layout=True)
    road, lab = arms(whole.get("road", {}).get("runs", {})), arms(whole.get("lab", {}).get("runs", {}))
    _band(axes[0], road, lambda row: row["avg@4"], "real stack: held-out avg@4", 100)
    _band(axes[1], road, lambda row: row["flawed"], "real stack: flawed among right answers", 100)
    for run in road.get("fapo", []):
        for kind, colour in (("sound", "#3ca951"), ("flawed", "#d4462f"), ("wrong", "#8a8f98")):
            points = smoothed(run["train"][f"advantage/{kind}"])
            if points:
                first = run is road["fapo"][0]
                axes[2].plot(*zip(*points, strict=True), color=colour, linewidth=1.4, label=kind if first else None)
    axes[2].axhline(0, color="#20262e", linewidth=0.8)
    axes[2].set(title="fapo: mean advantage by verdict", xlabel="training step")
    for run in road.get("fapo", []):
        points = smoothed(run["train"].get("advantage/flawed_positive", []))
        if points:
            axes[3].plot(
                *zip(*((step, 100 * share) for step, share in points), strict=True), color="#d4462f", linewidth=1.4
            )
    axes[3].set(title="fapo: flawed answers that still gain", xlabel="training step", ylabel="%", ylim=(-2, 102))
    _band(axes[4], lab, lambda row: row["flawed"], "lab: flawed among right answers", 100)
    for axis in axes:
        axis.grid(alpha=0.25)
        axis.spines[["top", "right"]].set_visible(False)
        if axis.get_legend_handles_labels()[0]:
            axis.legend(frameon=False, fontsize=8)
    figure.savefig(path, dpi=130)
    pyplot.close(figure)


def _band(
    axis: Any, found: dict[str, list], value: Callable[[dict[str, Any]], float | None], title: str, scale: float
) -> None:
    """Mean over seeds, the band from lowest to highest, at the steps that all of an arm's runs have."""
    for arm, runs in found.items():
        points = []
        for rows in zip(*(run["curve"] for run in runs), strict=False):
            known = [scale * v for v in map(value, rows) if v is not None]
            if known:
                points.append((rows[0]["step"], statistics.fmean(known), min(known), max(known)))
        if points:
            steps, mean, low, high = zip(*points, strict=True)
            axis.plot(steps, mean, color=COLOUR[arm], marker="o", markersize=3, label=LABELS[arm])
            axis.fill_between(steps, low, high, color=COLOUR[arm], alpha=0.15, linewidth=0)
    axis.set(title=title, xlabel="training step", ylabel="%")
