"""`python -m rltk.evaluate model=... task=... samples=8`: avg@k, pass@k and greedy accuracy, with 95 % intervals.

The same engine, prompts and scorers as in training, and the full KV cache unless `kv=<policy>` says another. Prints a
table and, last, one JSON line; with `output=<folder>` it also writes `<folder>/<name>.evaluation.json` and the samples
beside it.
"""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from rltk.checks import check
from rltk.cli import run_entry, wants_help
from rltk.compose import load
from rltk.config import Config
from rltk.errors import ConfigError
from rltk.files import write_json, write_text
from rltk.model_folder import resolve_model
from rltk.placement import place
from rltk.prompt_checks import check_prompts
from rltk.tasks import build_task

ALIASES = {"samples": "evaluation.samples", "problems": "evaluation.problems", "greedy": "evaluation.greedy"}
USAGE = f"""usage: python -m rltk.evaluate [model=<folder or id>] [task=<name>] [samples=8] [problems=128] [output=...]

Any key of `python -m rltk.train` may follow; {", ".join(f"{a} is {k}" for a, k in ALIASES.items())}."""


def main(argv: list[str]) -> int:
    if wants_help(argv):
        print(USAGE)
        return 0
    writes = any(argument.startswith("output=") for argument in argv)
    config = resolve_model(load(argv, ALIASES))
    for warning in check(config, training=False):
        print(f"rltk: warning: {warning}", file=sys.stderr)
    task = build_task(config.task)
    records = task.held_out(config.evaluation.problems)
    if not records:
        raise ConfigError(
            f"task={config.task.name} has no held-out problems. Fix: task.held_out or task.held_out_path."
        )
    check_prompts(config, records)
    figures, rows = _evaluate(config, records, getattr(task, "figures", None))
    _print(config, figures)
    if writes:
        folder = Path(config.output)
        write_json(folder / f"{config.name}.evaluation.json", figures)
        write_text(folder / f"{config.name}.samples.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
    print(json.dumps(figures))
    return 0


def _evaluate(config: Config, records: list[Any], own: Any) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    from rltk.cluster import connect
    from rltk.evaluation import evaluate
    from rltk.pool import RolloutPool
    from rltk.rewards.scorer import check_scorer
    from rltk.roles import scorer_spec, start_roles
    from rltk.rollout.worker import Sampling
    from rltk.tracker import sample_row

    check_scorer(scorer_spec(config))
    placement = place(dataclasses.replace(config, learner=dataclasses.replace(config.learner, ranks=0)))
    sampling = Sampling(
        config.rollout.temperature, config.task.max_prompt_tokens, config.task.max_response_tokens, evaluation=True
    )
    with connect(config.cluster, placement):
        roles = start_roles(config, placement, train=False, say=lambda what: print(f"{what} ...", file=sys.stderr))
        try:
            pool = RolloutPool(roles, config, lambda what, done, total: None)
            figures, trajectories = evaluate(
                pool, records, config.evaluation.samples, sampling, config.seed, config.evaluation.greedy, own
            )
        finally:
            roles.stop()
    if config.kv.name != "full":
        figures |= {"kv": config.kv.name, "kv_budget": config.kv.budget}
    by_id = {record.id: record for record in records}
    return figures, [sample_row(t, by_id[t.prompt_id]) for t in trajectories]


def _print(config: Config, figures: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table

    shown = [
        n for n in figures if n.startswith(("avg@", "pass@", "greedy", "flawed", "masked")) and not n.endswith("_ci")
    ]
    names = [name for name in shown if name != "pass@1"]  # the same as avg@k
    cache = f", kv={config.kv.name} {config.kv.budget:g}" if config.kv.name != "full" else ""
    table = Table(title=f"{config.task.name} with {config.model.name}{cache}: {figures['problems']} held-out problems")
    table.add_column("level")
    for name in names:
        table.add_column(name, justify="right")

    def cell(row: dict[str, Any], name: str) -> str:
        if name not in row:
            return "-"
        low_high = row.get(f"{name}_ci")
        return f"{row[name]:.1%}" + (f" [dim]{low_high[0]:.0%}-{low_high[1]:.0%}[/dim]" if low_high else "")

    for level, row in {"all": figures, **figures.get("levels", {})}.items():
        table.add_row(level, *(cell(row, name) for name in names))
    console = Console(highlight=False)
    console.print(table)
    for line in (*_tool_lines(figures), *_judge_lines(figures)):
        console.print(line, markup=False)


def _tool_lines(figures: dict[str, Any]) -> Iterator[str]:
    """What the samples did with tools, and what ATTC and DTSR did to them."""
    if "tools/used" in figures:
        ends = {name.removeprefix("tools/status/"): share for name, share in figures.items() if "/status/" in name}
        ended = ", ".join(f"{status} {share:.1%}" for status, share in ends.items() if share)
        used = f"used in {figures['tools/used']:.1%} of the samples, {figures['tools/calls']:.2f} calls a sample"
        yield f"tools: {used}" + (f"; they ended {ended}" if ended else "")
    if "tools/ignored" in figures:
        yield f"tools: of the wrong answers with a call, {figures['tools/ignored']:.1%} ignored a right last result"
    if "attc/trust" in figures:
        yield f"attc: {figures['attc/trust']:.1%} of the turns with calls were met with belief"
    if "dtsr/closed" in figures:
        closed, checks = figures["dtsr/closed"], figures["dtsr/checks"]
        yield f"dtsr: thought closed in {closed:.1%} of the samples, {checks:.2f} checks a sample"


def _judge_lines(figures: dict[str, Any]) -> Iterator[str]:
    """How well the model judges, where that is its task (rltk/tasks/judged.py), or how well the run's judge does."""
    for answers, before in (("samples", ""), ("greedy answers", "greedy/")):
        for kinds, behind in (("", ""), (" of unseen kinds of error", "/unseen")):
            names = [f"{before}genrm/{name}{behind}" for name in ("f1", "precision", "recall")]
            if names[0] in figures:
                f1, precision, recall = (f"{figures[name]:.1%}" if name in figures else "-" for name in names)
                yield f'judge, {answers}{kinds}: F1 {f1} of "flawed", precision {precision}, recall {recall}'


if __name__ == "__main__":
    run_entry(main)
