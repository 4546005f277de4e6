"""A Plan as text, 100 columns wide."""

from __future__ import annotations

from io import StringIO

from rich.console import Console
from rich.table import Table
from rich.text import Text

from rltk.plan import Plan

WIDTH = 100


def render(plan: Plan, warnings: list[str] | None = None, color: bool = False) -> str:
    """The plan for people; `warnings` are what `rltk.checks.check` returned."""
    console = Console(file=StringIO(), width=WIDTH, force_terminal=color, no_color=not color, highlight=False)
    console.print(_headline(plan))
    for title, table in (
        ("Roles", _roles(plan)),
        ("Batch", _pairs(_arithmetic(plan))),
        ("Memory", _pairs(list(plan.memory))),
        (f"Written to {plan.folder}", _pairs(list(plan.written))),
    ):
        console.print()
        console.print(Text(title, style="bold"), soft_wrap=True)
        console.print(table)
    for warning in warnings or []:
        console.print()
        console.print(Text(f"Warning: {warning}", style="yellow"))
    file = console.file
    assert isinstance(file, StringIO)
    return "\n".join(line.rstrip() for line in file.getvalue().splitlines()) + "\n"


def _headline(plan: Plan) -> Text:
    at, model = plan.placement, plan.facts
    where = f"CPU, {at.cores} cores" if at.device == "cpu" else f"{at.gpus} GPU(s), {at.cores} cores"
    size = f"{_count(model.parameters)} parameters" if model.parameters else "size unknown"
    context = f", context {model.context:,}" if model.context else ""
    return Text.assemble(
        (plan.name, "bold"),
        f"\n  {plan.algorithm} on {plan.task} with {plan.model} ({size}{context}), on {where}",
    )


def _roles(plan: Plan) -> Table:
    table = Table(box=None, padding=(0, 1, 0, 2), header_style="dim")
    table.add_column("role", no_wrap=True)
    for name in ("actors", "Ray CPUs", "GPUs", "threads"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("", ratio=1)
    for role in plan.roles:
        gpus = f"{role.gpus:g}" if role.gpus else "-"
        table.add_row(role.name, str(role.actors), f"{role.cpus:g}", gpus, str(role.threads), role.note)
    return table


def _arithmetic(plan: Plan) -> list[tuple[str, str]]:
    batch, held_out = plan.batch, plan.evaluation
    greedy = " + 1 greedy" if held_out.greedy else ""
    return [
        ("a training step", f"{batch.prompts:,} prompts x {batch.samples} samples = {batch.sequences:,} sequences"),
        (
            "an optimizer step",
            f"{batch.sequences:,} / {batch.minibatches} minibatches = {batch.sequences_per_minibatch:,} sequences",
        ),
        (
            "a rank's share",
            f"{batch.sequences_per_minibatch:,} / {batch.ranks} = {batch.sequences_per_rank:,} sequences "
            f"x {batch.tokens_per_sequence:,} tokens = {batch.tokens_per_rank:,} tokens at most",
        ),
        ("its micro-batches", f"{batch.micro_batches:,} at most"),
        (
            "the run",
            f"{batch.steps:,} steps x {batch.minibatches} = {batch.optimizer_steps:,} optimizer steps, "
            f"{batch.response_tokens:,} sampled tokens at most, without refills",
        ),
        (
            "held-out evaluation",
            f"{held_out.times} times {held_out.problems:,} problems x ({held_out.samples} samples{greedy}) "
            f"= {held_out.sequences:,} sequences",
        ),
    ]


def _pairs(rows: list[tuple[str, str]]) -> Table:
    table = Table(box=None, show_header=False, padding=(0, 1, 0, 2))
    table.add_column(no_wrap=True, min_width=22)
    table.add_column(ratio=1)
    for left, right in rows:
        table.add_row(left, right)
    return table


def _count(number: int) -> str:
    for unit, size in (("B", 1e9), ("M", 1e6), ("K", 1e3)):
        if number >= size:
            return f"{number / size:.3g} {unit}"
    return str(number)
