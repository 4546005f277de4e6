"""Which charts a run gets, by section. A chart without data is left out."""

from __future__ import annotations

from rltk.report.charts import COLOURS, Chart, Series, band_panels, line_chart, stacked_chart
from rltk.report.data import Run
from rltk.time_ledger import STAGES

CLIPS = {"share": "any bound", "high": "upper", "low": "lower", "dual": "dual", "outside": "outside"}
CALL_SECONDS = {"queue": "waiting", "run": "wall", "cpu": "processor"}


def sections(run: Run) -> list[tuple[str, list[Chart]]]:
    """(heading, charts), empty sections left out."""
    found = [("Learning", _learning(run)), ("The update", _update(run)), ("Sampler against learner", _mismatch(run))]
    found += [("Responses", _responses(run)), ("Tools", _tools(run)), ("Judge", _judge(run)), ("Time", _time(run))]
    charts = [(heading, [chart for chart in charts if chart is not None]) for heading, charts in found]
    return [(heading, kept) for heading, kept in charts if kept]


def _metric(run: Run, name: str, label: str = "", colour: int = 0, dashed: bool = False) -> Series:
    x, y = run.series(name)
    return Series(label or name, x, y, colour, dashed=dashed)


def _learning(run: Run) -> list[Chart | None]:
    average = run.average or "avg@4"
    x, y = run.held_out(average)
    intervals = {row["step"]: row[f"{average}_ci"] for row in run.evaluations if row.get(f"{average}_ci")}
    low, high = ([intervals[s][end] for s in x] if all(s in intervals for s in x) else None for end in (0, 1))
    held_out = Series(f"held-out {average}", x, y, 0, low, high, points=True)
    greedy = Series("held-out greedy", *run.held_out("greedy"), colour=1, points=True)
    return [
        line_chart(
            "Accuracy",
            "share of right answers; band: 95 % confidence interval over problems",
            [held_out, greedy, _metric(run, "accuracy", "training samples", 2)],
            percent=True,
        ),
        line_chart("Held-out accuracy by level", f"{average}, by difficulty", _levels(run, average), percent=True),
        _reward(run),
        line_chart(
            "Right answer, wrong step",
            "flawed solutions among right answers",
            [
                Series("held-out", *run.held_out("flawed"), colour=0, points=True),
                _metric(run, "flawed", "training samples", 2),
            ],
            percent=True,
        ),
        line_chart(
            "Advantage by verdict",
            "mean over samples: right and sound, right but flawed, wrong",
            [_metric(run, f"advantage/{kind}", kind, i) for i, kind in enumerate(("sound", "flawed", "wrong"))]
            if run.series("advantage/flawed")[0]
            else [],
        ),
        line_chart(
            "Groups that teach nothing",
            "share of groups whose samples all have the same reward, and of samples without a reward",
            [_metric(run, "reward/constant_groups", "constant groups", 3), _metric(run, "masked/share", "masked", 4)],
            percent=True,
        ),
    ]


def _levels(run: Run, average: str) -> list[Series]:
    levels = sorted({level for row in run.evaluations for level in row.get("levels") or {}})
    series = []
    for index, level in enumerate(levels):
        rows = [row for row in run.evaluations if average in (row.get("levels") or {}).get(level, {})]
        x, y = [row["step"] for row in rows], [row["levels"][level][average] for row in rows]
        series.append(Series(level, x, y, index % COLOURS, points=True))
    return series


def _reward(run: Run) -> Chart | None:
    x, mean = run.series("reward/mean")
    spread = dict(zip(*run.series("reward/std"), strict=True))
    low, high = None, None
    if x and all(step in spread for step in x):
        low = [m - spread[s] for s, m in zip(x, mean, strict=True)]
        high = [m + spread[s] for s, m in zip(x, mean, strict=True)]
    return line_chart("Reward", "mean over samples; band: one standard deviation", [Series("", x, mean, 2, low, high)])


def _update(run: Run) -> list[Chart | None]:
    clips = [_metric(run, f"clip/{name}", label, i) for i, (name, label) in enumerate(CLIPS.items())]
    return [
        line_chart(
            "Clipped tokens",
            "share of sampled tokens whose gradient a bound takes, and of those outside the window at all",
            clips,
            percent=True,
        ),
        line_chart("Spread of log ρ", "standard deviation over tokens", [_metric(run, "log_rho/sd")], zero=True),
        line_chart("Gradient norm", "before clipping", [_metric(run, "grad_norm", colour=3)], zero=True),
        line_chart("Learning rate", "", [_metric(run, "lr", colour=4)], zero=True),
        line_chart(
            "Entropy",
            "of the policy, mean over sampled tokens",
            [_metric(run, "entropy", colour=5)],
            zero=True,
        ),
        line_chart("Loss", "of the objective; its level has no meaning of its own", [_metric(run, "loss", colour=6)]),
        _ratios(run),
    ]


def _ratios(run: Run) -> Chart | None:
    panels = []
    for name in run.names("ratio/q50/"):
        bucket = name.removeprefix("ratio/q50/")
        x, middle = run.series(name)
        low, high = (dict(zip(*run.series(f"ratio/{q}/{bucket}"), strict=True)) for q in ("q05", "q95"))
        if not all(step in low and step in high for step in x):
            continue
        band = Series(bucket, x, middle, 0, [low[s] for s in x], [high[s] for s in x])
        panels.append((f"tokens {bucket}", band))
    note = "log(new / old) of sampled tokens, by position in the response: median and 5th to 95th percentile"
    return band_panels("Ratios by position", note, panels)


def _mismatch(run: Run) -> list[Chart | None]:
    tails = run.names("mismatch/tail_p05/")
    causes = run.names("mismatch/mean/")
    return [
        line_chart(
            "By cause",
            "mean |log μ − log old| of a token, and what of it is arithmetic, evicted or coarse keys, older weights",
            [_metric(run, name, name.rsplit("/", 1)[-1], i % COLOURS) for i, name in enumerate(causes)],
        ),
        line_chart(
            "KL(sampler, learner)",
            "nats a token, of the same weights in the two programs",
            [_metric(run, "mismatch/kl")],
            log=True,
        ),
        line_chart(
            "Largest gap", "largest |log μ − log old| of a token", [_metric(run, "mismatch/max", colour=3)], log=True
        ),
        line_chart(
            "5th percentile",
            "of log μ − log old over tokens: those that the learner finds far likelier",
            [_metric(run, "mismatch/kl_p05", colour=1)],
        ),
        line_chart(
            "Tail",
            "sampled tokens in a thousand with min(ξ, 1/ξ) < 0.5",
            [_metric(run, "mismatch/tail_per_1k", colour=4)],
            zero=True,
        ),
        line_chart(
            "Tail by position",
            "5th percentile of min(ξ, 1/ξ) in each thousand of positions; 1 is no mismatch",
            [_metric(run, name, name.removeprefix("mismatch/tail_p05/"), i % COLOURS) for i, name in enumerate(tails)],
        ),
    ]


def _responses(run: Run) -> list[Chart | None]:
    return [
        line_chart(
            "Length",
            "sampled tokens of a response",
            [_metric(run, "length/mean", "mean", 0), _metric(run, "length/max", "longest", 1)],
            zero=True,
        ),
        line_chart("Truncated", "responses cut off by the limit", [_metric(run, "truncated", colour=1)], percent=True),
    ]


def _tools(run: Run) -> list[Chart | None]:
    ended = [name for name in run.names("tools/status/") if any(run.series(name)[1])]
    seconds = [_metric(run, f"tools/{name}_s_p95", label, i) for i, (name, label) in enumerate(CALL_SECONDS.items())]
    return [
        line_chart(
            "Use",
            "share of trajectories with a call",
            [_metric(run, "tools/used", "training", 2), Series("held-out", *run.held_out("tools/used"), points=True)],
            percent=True,
        ),
        line_chart("Calls", "of a trajectory, mean", [_metric(run, "tools/calls", colour=3)], zero=True),
        line_chart(
            "How calls end",
            "share of calls",
            [_metric(run, name, name.removeprefix("tools/status/"), i % COLOURS) for i, name in enumerate(ended)],
            percent=True,
        ),
        line_chart("Seconds of a call", "95th percentile", seconds, zero=True),
        line_chart(
            "Trust",
            "turns with calls that ATTC met with belief; wrong answers whose last result held the right one",
            [_metric(run, "attc/trust", "believed", 2), _metric(run, "tools/ignored", "result ignored", 1)],
            percent=True,
        ),
        line_chart(
            "Thought closed early",
            "share of trajectories whose thought a sufficiency check closed",
            [_metric(run, "dtsr/closed", "training", 2), Series("held-out", *run.held_out("dtsr/closed"), points=True)],
            percent=True,
        ),
    ]


def _judge(run: Run) -> list[Chart | None]:
    against = ("precision", "recall", "f1")
    held_out = [
        Series(f"held-out {name}", *run.held_out(f"genrm/{name}"), colour=i, points=True)
        for i, name in enumerate(against)
    ]
    return [
        line_chart(
            "Verdicts",
            "share of samples asked about; of the verdicts those that say flawed; of the questions those without one",
            [_metric(run, f"genrm/{name}", name, i) for i, name in enumerate(("asked", "flawed", "unknown"))],
            percent=True,
        ),
        line_chart(
            "Against the rule",
            "the judge's “flawed” against the task's own label, of right answers",
            [*held_out, *(_metric(run, f"genrm/{name}", name, i) for i, name in enumerate(against))],
            percent=True,
        ),
        line_chart(
            "Drift",
            "canaries that are answered otherwise than at the start, and those answered right",
            [_metric(run, "genrm/drift", "drift", 1), _metric(run, "genrm/canary_accuracy", "right", 2)],
            percent=True,
        ),
        line_chart(
            "Seconds of a verdict",
            "waiting included: 95th percentile of the step; median and 99th of the service's latest",
            [_metric(run, f"genrm/{name}", name, i) for i, name in enumerate(("seconds_p95", "p50_s", "p99_s"))],
            zero=True,
        ),
    ]


def stages(run: Run) -> list[str]:
    """Stages of the time ledger, known ones in their usual order, then any other."""
    present = [name.removeprefix("time/") for name in run.names("time/") if name != "time/step"]
    known = (*STAGES, "other")
    return [s for s in known if s in present] + [s for s in present if s not in known]


def _time(run: Run) -> list[Chart | None]:
    rows = [row for row in run.metrics if "time/step" in row]
    names = stages(run)
    parts = {
        stage: ([row.get(f"time/{stage}") or 0.0 for row in rows], index % COLOURS) for index, stage in enumerate(names)
    }
    return [
        stacked_chart("Time ledger", "seconds of each step, by stage", [row["step"] for row in rows], parts),
        line_chart(
            "Throughput",
            "tokens a second while the role works",
            [
                _metric(run, "tokens_per_s/rollout", "sampling", 0),
                _metric(run, "tokens_per_s/learner", "learning", 3),
            ],
            zero=True,
        ),
    ]
