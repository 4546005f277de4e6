"""Tables and plots of bench.offpolicy: means over seeds with their spread, curves with bands."""

from __future__ import annotations

import json
import platform
import statistics
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rltk.files import write_text
from rltk.lab.arm import Settings
from rltk.manifest import versions

COLOURS = {
    "grpo": "#4269d0", "gspo": "#efb118", "cispo": "#ff725c", "minpro": "#6cc5b0", "ctpo": "#3ca951",
    "dgpo": "#a463f2", "fapo": "#9c6b4e",
}  # fmt: skip
Cells = dict[str, dict[str, Any]]  # "staleness s, minibatches m" -> run -> figures


def report(tables: dict[str, Cells], settings: Settings, command: str, hardware: str, out: Path) -> None:
    """offpolicy.json (every run), offpolicy.md (means), offpolicy_<table>.png and offpolicy_flawed.png."""
    common = {key: value for key, value in asdict(settings).items() if key not in ("model", "minibatches")}
    header = {"command": command, "hardware": f"{platform.machine()}, {hardware}", "versions": versions(),
              "settings": common}  # fmt: skip
    write_text(out / "offpolicy.json", _compact(header, tables))
    write_text(
        out / "offpolicy.md", "\n".join(text for name, cells in tables.items() for text in markdown(name, cells))
    )
    for name, cells in tables.items():
        plot(out / f"offpolicy_{name}.png", cells, "accuracy", "held-out avg@4, %", list(COLOURS))
    if "equal" in tables:
        plot(out / "offpolicy_flawed.png", tables["equal"], "flawed", "flawed among right answers, %", ["grpo", "fapo"])
    figures = {name: {cell: summary(runs) for cell, runs in cells.items()} for name, cells in tables.items()}
    print(json.dumps({"bench": "offpolicy", **header, "figures": figures}))


def _compact(header: dict[str, Any], tables: dict[str, Cells]) -> str:
    """JSON with a line a run: its figures, and its curve by column."""
    lines = []
    for table, cells in tables.items():
        for cell, runs in cells.items():
            for name, run in runs.items():
                curve = {key: [_short(point[key]) for point in run["curve"]] for key in run["curve"][0]}
                figures = {key: _short(value) for key, value in run.items() if key != "curve"}
                lines.append(json.dumps({"table": table, "cell": cell, "run": name, **figures, "curve": curve}))
    return json.dumps(header, indent=1)[:-2] + ',\n "runs": [\n' + ",\n".join(lines) + "\n]}\n"


def _short(value: Any) -> Any:
    return float(f"{value:.5g}") if isinstance(value, float) else value


def summary(runs: dict[str, Any]) -> dict[str, Any]:
    """Means over seeds, by method."""
    found = {}
    for method in COLOURS:
        mine = [run for name, run in runs.items() if name.rsplit("-", 1)[0] == method]
        if not mine:
            continue

        def mean(key: str, mine: list[Any] = mine) -> float | None:
            values = [run[key] for run in mine if run[key] is not None]
            return statistics.fmean(values) if values else None

        finals = [run["final"] for run in mine]
        found[method] = {
            "final": mean("final"), "final_sd": statistics.stdev(finals) if len(finals) > 1 else None,
            "best": mean("best"), "flawed": mean("flawed"), "collapsed": sum(run["collapsed"] for run in mine),
            "runs": len(mine), "kl_start": max(run["kl_start"] for run in mine if run["kl_start"] is not None),
            "kl_sampler": max(run["kl_sampler"] for run in mine if run["kl_sampler"] is not None),
            "noise": _median(mine, "noise"), "clipped": mean("clipped"),
        }  # fmt: skip
    return found


def _median(runs: list[Any], key: str) -> float | None:
    """Noise is a quotient: one step whose halves cancel would rule a mean."""
    values = [run[key] for run in runs if run[key] is not None]
    return statistics.median(values) if values else None


def markdown(table: str, cells: Cells) -> list[str]:
    lines = []
    for cell in sorted(cells, key=_order):
        lines += [f"### {table}: {cell}", ""]
        lines += ["| method | final | best | collapsed | flawed, final | largest KL to start | largest KL(sampler, "
                  "learner) | gradient noise | clipped |", "|---|---|---|---|---|---|---|---|---|"]  # fmt: skip
        for method, row in summary(cells[cell]).items():
            spread = f" ± {100 * row['final_sd']:.1f}" if row["final_sd"] is not None else ""
            lines.append(
                f"| {method} | {100 * row['final']:.1f}{spread} % | {100 * row['best']:.1f} % "
                f"| {row['collapsed']} of {row['runs']} | {_percent(row['flawed'])} | {row['kl_start']:.3f} "
                f"| {row['kl_sampler']:.3f} | {_number(row['noise'])} | {_percent(row['clipped'])} |"
            )
        lines.append("")
    return lines


def plot(path: Path, cells: Cells, key: str, title: str, methods: list[str]) -> None:
    """A panel a cell; each method's mean over seeds, and the band from the worst to the best seed."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    places = sorted(cells, key=_order)
    rows = len({_order(cell)[0] for cell in places})
    columns = -(-len(places) // rows)
    figure, axes = pyplot.subplots(rows, columns, figsize=(4.2 * columns, 3.0 * rows), sharex=True, sharey=True,
                                   constrained_layout=True, squeeze=False)  # fmt: skip
    for axis, cell in zip(axes.flat, places, strict=False):
        for method in methods:
            curves = [run["curve"] for name, run in cells[cell].items() if name.rsplit("-", 1)[0] == method]
            points = [[point[key] for point in column] for column in zip(*curves, strict=True)]
            steps = [point["step"] for point in curves[0]] if curves else []
            known = [(s, [100 * v for v in p if v is not None]) for s, p in zip(steps, points, strict=True)]
            known = [(s, p) for s, p in known if p]
            if known:
                x = [s for s, _ in known]
                axis.fill_between(x, [min(p) for _, p in known], [max(p) for _, p in known], color=COLOURS[method],
                                  alpha=0.12, linewidth=0)  # fmt: skip
                axis.plot(
                    x, [statistics.fmean(p) for _, p in known], color=COLOURS[method], label=method, linewidth=1.6
                )
        axis.set_title(cell, fontsize=10)
        axis.grid(alpha=0.25)
        axis.spines[["top", "right"]].set_visible(False)
    for axis in axes[-1]:
        axis.set_xlabel("training step")
    for axis in axes[:, 0]:
        axis.set_ylabel(title)
    axes[0, 0].legend(frameon=False, fontsize=8, ncols=2)
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def _order(cell: str) -> tuple[int, int]:
    staleness, minibatches = (int(part.split()[1]) for part in cell.split(", "))
    return staleness, minibatches


def _percent(value: float | None) -> str:
    return "" if value is None else f"{100 * value:.1f} %"


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.2f}"
