"""The HTML of a report: headline figures, time, charts, samples, configuration. No script, nothing fetched."""

from __future__ import annotations

from collections.abc import Iterable
from html import escape
from importlib.resources import files
from typing import Any

from rltk.metrics import TAIL_ALARM
from rltk.report.charts import COLOURS, Chart
from rltk.report.data import Run
from rltk.report.figures import sections, stages
from rltk.report.samples import render_samples

_READING = (
    "Horizontal axes count training steps. Where there are two lines of one colour, the thin one is each step and the "
    "thick one the mean over its neighbours. Lines with dots are held-out evaluations."
)
_STATUS = {"finished": "good", "failed": "bad"}  # css class; anything else is "warn"


def render(run: Run) -> str:
    charts = sections(run)
    body = [_header(run), _alarm(run), _cards(_headline(run)), _ledger(run)]
    if charts:
        body.append(f"<p class='muted reading'>{_READING}</p>")
    for heading, found in charts:
        body.append(f"<h2>{escape(heading)}</h2><div class='charts'>{''.join(map(_chart, found))}</div>")
    body += [render_samples(run), _settings(run)]
    style = files("rltk.report").joinpath("style.css").read_text(encoding="utf-8")
    return (
        "<!doctype html><html lang='en'><head><meta charset='utf-8'>"
        "<meta name='viewport' content='width=device-width, initial-scale=1'>"
        f"<title>{escape(run.folder.resolve().name)} · rltk</title><style>{style}</style></head>"
        f"<body><main>{''.join(body)}<footer>Made by <code>python -m rltk.report</code> from the files of the run."
        "</footer></main></body></html>\n"
    )


def _header(run: Run) -> str:
    status = str(run.summary.get("status", "no summary yet"))
    kind = _STATUS.get(status, "warn")
    facts = [run.summary.get(key) for key in ("algorithm", "task", "model")]
    if run.summary.get("kv", "full") != "full":
        facts.append(f"kv={run.summary['kv']} {run.summary.get('kv_budget', 0):g}")
    line = " · ".join(escape(str(fact)) for fact in facts if fact)
    name = escape(run.folder.resolve().name)
    error = f"<p class='bad'>{escape(str(run.summary['error']))}</p>" if run.summary.get("error") else ""
    return f"<header><h1>{name}</h1><span class='badge {kind}'>{escape(status)}</span><p>{line}</p>{error}</header>"


def _alarm(run: Run) -> str:
    """Said on top, as curves of reward look well long after the samples have stopped being the learner's."""
    steps = [step for step, value in zip(*run.series("mismatch/alarm"), strict=True) if value]
    if not steps:
        return ""
    which = f"step {steps[0]}" if len(steps) == 1 else f"{len(steps)} steps, {steps[0]} to {steps[-1]}"
    text = f"Mismatch alarm in {which}: the 5th percentile of min(ξ, 1/ξ), ξ = old / μ, is under {TAIL_ALARM:g}."
    return f"<p class='bad'>{escape(text)} See “Sampler against learner”.</p>"


def _headline(run: Run) -> Iterable[tuple[str, str, str]]:
    """(label, value, detail), for what the run has."""
    average = run.average
    for label, name in ((f"Held-out {average}", average), ("Held-out greedy", "greedy")):
        values = run.held_out(name)[1] if name else []
        if values:
            yield label, f"{values[-1]:.1%}", f"from {values[0]:.1%}, best {max(values):.1%}"
    values = run.held_out("flawed")[1] or run.series("flawed")[1]
    if values:
        yield "Flawed among right", f"{values[-1]:.1%}", f"from {values[0]:.1%}"
    steps = run.metrics[-1]["step"] if run.metrics else 0
    seconds = run.summary.get("wall_seconds")
    yield "Training steps", f"{steps:,}", _duration(seconds) if seconds else ""
    if "tokens_sampled" in run.summary:
        dropped = run.summary.get("tokens_dropped", 0)
        trained = run.summary.get("tokens_trained", 0)
        yield (
            "Tokens sampled",
            _short(run.summary["tokens_sampled"]),
            f"{_short(trained)} trained, {_short(dropped)} dropped",
        )
    mismatch = run.series("mismatch/kl")[1]
    if mismatch:
        yield "KL(sampler, learner)", f"{sum(mismatch) / len(mismatch):.1e}", "nats a token, mean over steps"


def _cards(cards: Iterable[tuple[str, str, str]]) -> str:
    cells = (
        f"<div class='card'><div class='label'>{escape(label)}</div><div class='value'>{escape(value)}</div>"
        f"<div class='detail'>{escape(detail)}</div></div>"
        for label, value, detail in cards
    )
    return f"<div class='cards'>{''.join(cells)}</div>"


def _ledger(run: Run) -> str:
    """Where the run's time went: the sum over steps, as one bar."""
    total = sum(run.series("time/step")[1])
    if total <= 0:
        return ""
    spent = {stage: sum(run.series(f"time/{stage}")[1]) for stage in stages(run)}
    bar, legend = [], []
    for index, (stage, seconds) in enumerate(spent.items()):
        colour = f"background: var(--c{index % COLOURS})"
        bar.append(f"<span style='width: {seconds / total:.2%}; {colour}' title='{escape(stage)}'></span>")
        figures = f"{seconds / total:.1%} <span class='muted'>{_duration(seconds)}</span>"
        legend.append(f"<span><i style='{colour}'></i>{escape(stage)} {figures}</span>")
    return (
        f"<h2>Where the time went</h2><div class='ledger'><div class='shares'>{''.join(bar)}</div>"
        f"<div class='legend'>{''.join(legend)}</div></div>"
    )


def _chart(chart: Chart) -> str:
    legend = "".join(
        f"<span><i style='background: var(--c{colour})'></i>{escape(label)}</span>" for label, colour in chart.legend
    )
    return (
        f"<figure class='chart span{chart.columns}'><h3>{escape(chart.title)}</h3>"
        f"<div class='note'>{escape(chart.note)}</div>"
        + (f"<div class='legend'>{legend}</div>" if legend else "")
        + f"{chart.svg}</figure>"
    )


def _settings(run: Run) -> str:
    parts = []
    if run.config:
        parts.append(f"<details><summary>Configuration</summary><pre>{escape(run.config)}</pre></details>")
    versions = run.manifest.get("versions")
    if isinstance(versions, dict):
        rows = "".join(f"<tr><th>{escape(k)}</th><td>{escape(str(v))}</td></tr>" for k, v in versions.items())
        parts.append(f"<details open><summary>Versions</summary><table>{rows}</table></details>")
    if run.summary:
        rows = "".join(f"<tr><th>{escape(k)}</th><td>{escape(str(v))}</td></tr>" for k, v in _flat(run.summary))
        parts.append(f"<details><summary>Summary</summary><table>{rows}</table></details>")
    return f"<h2>What was run</h2>{''.join(parts)}" if parts else ""


def _flat(value: dict[str, Any], prefix: str = "") -> Iterable[tuple[str, Any]]:
    for key, item in value.items():
        if isinstance(item, dict):
            yield from _flat(item, f"{prefix}{key}.")
        else:
            yield prefix + key, f"{item:.6g}" if isinstance(item, float) else item


def _duration(seconds: float) -> str:
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"


def _short(count: float) -> str:
    for unit, size in (("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if count >= size:
            return f"{count / size:.2f}".rstrip("0").rstrip(".") + f" {unit}"
    return f"{count:,.0f}"
