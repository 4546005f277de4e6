"""Charts as inline SVG that takes its colours and font from the page, so that it reads on light and dark alike.

matplotlib draws with placeholder colours; they are replaced by CSS variables afterwards.
"""

from __future__ import annotations

import io
import itertools
import re
from dataclasses import dataclass, field
from typing import Any

import matplotlib
import numpy as np

matplotlib.use("svg")
from matplotlib.axes import Axes  # noqa: E402
from matplotlib.figure import Figure  # noqa: E402
from matplotlib.ticker import MaxNLocator, PercentFormatter  # noqa: E402

COLOURS = 8
_INK, _MUTED, _GRID = "#000101", "#000102", "#000103"
_PLACEHOLDERS = {_INK: "var(--ink)", _MUTED: "var(--muted)", _GRID: "var(--grid)"} | {
    f"#00020{i}": f"var(--c{i})" for i in range(COLOURS)
}
_STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",
    "font.size": 9,
    "text.color": _INK,
    "axes.edgecolor": _GRID,
    "axes.labelcolor": _MUTED,
    "axes.titlecolor": _MUTED,
    "xtick.color": _MUTED,
    "ytick.color": _MUTED,
    "grid.color": _GRID,
}
_SMOOTH_FROM = 30  # rows; from here on a mean over neighbours is drawn over the single steps
_salts = itertools.count()


@dataclass(frozen=True)
class Series:
    label: str
    x: list[float]
    y: list[float]
    colour: int = 0
    low: list[float] | None = None  # a band around y
    high: list[float] | None = None
    points: bool = False  # few, exact values: mark each
    dashed: bool = False


@dataclass(frozen=True)
class Chart:
    title: str
    note: str  # one line that says what is shown, in which unit
    svg: str
    legend: list[tuple[str, int]] = field(default_factory=list)  # (label, colour)
    columns: int = 1  # how many columns of the page it takes


def line_chart(
    title: str, note: str, series: list[Series], percent: bool = False, log: bool = False, zero: bool = False
) -> Chart | None:
    """None where no series has a value. `zero`: the axis starts at 0."""
    series = [s for s in series if s.y]
    if not series:
        return None
    with matplotlib.rc_context(_STYLE):
        figure, axes = _figure(1)
        for one in series:
            _draw(axes[0], one)
        _finish(axes[0], percent, log and _spans_decades(series), zero)
        svg = _svg(figure)
    legend = [(s.label, s.colour) for s in series] if len(series) > 1 else []
    return Chart(title, note, svg, legend)


def band_panels(title: str, note: str, panels: list[tuple[str, Series]]) -> Chart | None:
    """One small panel a series, sharing the y axis: for bands by position."""
    if not panels:
        return None
    with matplotlib.rc_context(_STYLE):
        figure, axes = _figure(len(panels), columns=3)
        for ax, (label, one) in zip(axes, panels, strict=True):
            _draw(ax, one)
            _finish(ax)
            ax.set_title(label, fontsize=9, loc="left")
        svg = _svg(figure)
    return Chart(title, note, svg, columns=3)


def stacked_chart(title: str, note: str, x: list[float], parts: dict[str, tuple[list[float], int]]) -> Chart | None:
    """Bars of parts that add up. parts: label -> (values, colour)."""
    if not x or not parts:
        return None
    with matplotlib.rc_context(_STYLE):
        figure, axes = _figure(1, columns=2)
        bottom = np.zeros(len(x))
        width = 0.85 * min(np.diff(x), default=1.0)
        for values, colour in parts.values():
            axes[0].bar(x, values, width, bottom=bottom, color=f"#00020{colour}", linewidth=0)
            bottom += values
        _finish(axes[0], zero=True)
        svg = _svg(figure)
    return Chart(title, note, svg, [(label, colour) for label, (_, colour) in parts.items()], columns=2)


def _figure(panels: int, columns: int = 1) -> tuple[Figure, list[Axes]]:
    figure = Figure(figsize=(4.6 * columns, 2.4), layout="constrained")
    figure.patch.set_alpha(0)
    axes = figure.subplots(1, panels, sharey=True, squeeze=False)[0]
    return figure, list(axes)


def _draw(axes: Axes, one: Series) -> None:
    colour = f"#00020{one.colour}"
    if one.low is not None and one.high is not None:
        axes.fill_between(one.x, one.low, one.high, color=colour, alpha=0.16, linewidth=0)
    style = "--" if one.dashed else "-"
    marker = "o" if one.points or len(one.y) == 1 else None
    if one.points or len(one.y) < _SMOOTH_FROM or one.low is not None:
        axes.plot(one.x, one.y, style, color=colour, linewidth=1.8, marker=marker, markersize=4)
        return
    axes.plot(one.x, one.y, color=colour, linewidth=0.8, alpha=0.35)
    axes.plot(one.x, _smooth(one.y), style, color=colour, linewidth=1.8)


def _spans_decades(series: list[Series]) -> bool:
    """A log axis needs positive values and some range: on a narrow one its ticks crowd."""
    low, high = min(min(s.y) for s in series), max(max(s.y) for s in series)
    return low > 0 and high > 10 * low


def _smooth(y: list[float]) -> np.ndarray:
    """Mean over a centred window of a tenth of the run; at the ends the window is cut, not padded."""
    half = max(1, len(y) // 20)
    return np.array([np.mean(y[max(0, i - half) : i + half + 1]) for i in range(len(y))])


def _finish(axes: Axes, percent: bool = False, log: bool = False, zero: bool = False) -> None:
    axes.set_facecolor("none")
    axes.grid(axis="y", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.tick_params(length=0)
    axes.xaxis.set_major_locator(MaxNLocator(nbins=6, integer=True))
    if log:
        axes.set_yscale("log")
    else:
        axes.yaxis.set_major_locator(MaxNLocator(nbins=5))
        axes.ticklabel_format(axis="y", scilimits=(-3, 4))
    if percent:
        axes.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=None))
        low, high = axes.get_ylim()
        axes.set_ylim(max(low, 0.0), min(high, 1.0) if low < 1.0 else high)
    if zero:
        axes.set_ylim(bottom=0)


def _svg(figure: Figure) -> str:
    stream = io.StringIO()
    # Ids of clip paths and markers are hashes: without a salt of its own each, charts on one page would share them.
    with matplotlib.rc_context({"svg.hashsalt": f"rltk-{next(_salts)}"}):
        figure.savefig(stream, format="svg", metadata={"Date": None, "Creator": None})
    svg = stream.getvalue()
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r'<g id="[^"]*"', "<g", svg)  # names of parts, the same in every chart; clip paths keep theirs
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.S)
    svg = re.sub(r'width="[\d.]+pt" height="[\d.]+pt"', 'role="img"', svg, count=1)
    svg = re.sub(r"font: ([\d.]+px) [^;\"]*", r"font-size: \1", svg)  # the page's font, not matplotlib's
    for placeholder, variable in _PLACEHOLDERS.items():
        svg = svg.replace(placeholder, variable)
    return svg
