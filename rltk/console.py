"""The live progress view: one panel that stays at the bottom of a terminal, or one plain line a step elsewhere.

What other code prints meanwhile (Ray forwards its workers' output through sys.stdout and sys.stderr) appears above the
panel, because rich puts both through itself while the panel is up. A logging handler made before that keeps the bare
stream: make handlers after the tracker, or print.
"""

from __future__ import annotations

import sys
import time
from collections import deque
from typing import Any

from rich.console import Console as Terminal
from rich.console import Group, RenderableType
from rich.live import Live
from rich.panel import Panel
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from rltk.time_ledger import STAGES

STAGE_COLOURS = ("blue", "magenta", "cyan", "green", "yellow", "red", "bright_black")
STEP_PHASES = {"generate", "reward", "logprobs", "train", "sync", "checkpoint"}  # too many for plain lines
BAR_CELLS = 24
RECENT_STEPS = 10  # the ETA is the mean of so many
# label, metric, format
SHOWN = (
    ("reward", "reward/mean", "{:.3f}"),
    ("accuracy", "accuracy", "{:.1%}"),
    ("flawed", "flawed", "{:.1%}"),
    ("tool use", "tools/used", "{:.1%}"),
    ("judge F1", "genrm/f1", "{:.1%}"),
    ("length", "length/mean", "{:.1f}"),
    ("entropy", "entropy", "{:.3f}"),
    ("clipped", "clip/share", "{:.2%}"),
    ("KL", "mismatch/kl", "{:.1e}"),  # between sampler and learner
    ("grad norm", "grad_norm", "{:.3f}"),
    ("tokens/s", "tokens_per_s/rollout", "{:,.0f}"),
    ("weights", "weight_version", "v{:.0f}"),
)


class Console:
    """`live` asks for the panel; it is shown only where standard output is a terminal. `title` stands on top of it."""

    def __init__(self, total: int, live: bool = True, terminal: Terminal | None = None, title: str = "rltk"):
        self.total, self.title = total, title
        self.terminal = terminal or Terminal(file=sys.stdout, highlight=False)
        self._step, self._row, self._evaluation = 0, {}, {}
        self._phase, self._done, self._phase_total, self._phase_begun = "start", None, None, time.monotonic()
        self._ends: deque[tuple[int, float]] = deque(maxlen=RECENT_STEPS + 1)
        self._live: Live | None = None
        if live and self.terminal.is_terminal and not self.terminal.is_dumb_terminal:
            self._live = Live(get_renderable=self._panel, console=self.terminal, refresh_per_second=4)
            self._live.start()

    def phase(self, name: str, done: int | None = None, total: int | None = None) -> None:
        new = name != self._phase
        if new:
            self._phase, self._phase_begun = name, time.monotonic()
        self._done, self._phase_total = done, total
        if new and self._live is None and name not in STEP_PHASES:
            self.message(f"{name} ...")

    def step(self, step: int, row: dict[str, float]) -> None:
        self._step, self._row = step, row
        self._ends.append((step, time.monotonic()))
        if self._live is None:
            self.message(self._line())

    def evaluation(self, step: int, row: dict[str, Any]) -> None:
        self._evaluation = {**row, "step": step}
        if self._live is None:
            self.message(f"held-out after step {step}: {self._evaluation_text()}")

    def message(self, text: str) -> None:
        """One line, above the panel where there is one."""
        self.terminal.print(text, markup=False, soft_wrap=True)
        if self._live is None:
            self.terminal.file.flush()

    def close(self) -> None:
        """Leave the last panel on the screen and give the terminal back. May be called twice."""
        if self._live is not None:
            self._phase = ""
            self._live.stop()
            self._live = None

    def eta_s(self) -> float | None:
        """Seconds to the last step at the pace of recent ones; None before two steps are done."""
        if len(self._ends) < 2:
            return None
        (first, begun), (last, ended) = self._ends[0], self._ends[-1]
        return (ended - begun) / max(1, last - first) * (self.total - last)

    def _line(self) -> str:
        shown = [f"{label} {form.format(self._row[key])}" for label, key, form in SHOWN if key in self._row]
        seconds = f"{self._row['time/step']:.1f} s" if "time/step" in self._row else ""
        eta = self.eta_s()
        left = f"{_clock(eta)} left" if eta is not None else ""
        return " | ".join(filter(None, [f"step {self._step}/{self.total}", *shown, seconds, left]))

    def _evaluation_text(self) -> str:
        average = next((key for key in self._evaluation if key.startswith("avg@") and not key.endswith("_ci")), "")
        shown = [f"{key} {self._evaluation[key]:.1%}" for key in (average, "greedy") if key in self._evaluation]
        levels = self._evaluation.get("levels") or {}
        by_level = [f"{level} {values[average]:.0%}" for level, values in levels.items() if average in values]
        return ", ".join(shown) + (f" ({', '.join(by_level)})" if by_level else "")

    def _panel(self) -> RenderableType:
        eta = self.eta_s()
        head = Table.grid(expand=True, padding=(0, 1))
        for ratio in (None, 1, None):
            head.add_column(ratio=ratio)
        left = f"{_clock(eta)} left" if eta is not None else ""
        bar = ProgressBar(total=self.total, completed=self._step)
        head.add_row(Text(f"step {self._step}/{self.total}", style="bold"), bar, left)

        figures = Table.grid(expand=True, padding=(0, 2))
        shown = [(label, form.format(self._row[key])) for label, key, form in SHOWN if key in self._row]
        for _ in range(5):
            figures.add_column(ratio=1)
        for begin in range(0, len(shown), 5):
            figures.add_row(*[Text.assemble((f"{label} ", "dim"), value) for label, value in shown[begin : begin + 5]])

        lines: list[RenderableType] = [head, figures]
        if "time/step" in self._row:
            lines.append(self._ledger())
        if self._evaluation:
            label = f"held-out after step {self._evaluation['step']}  "
            lines.append(Text.assemble((label, "dim"), self._evaluation_text()))
        if self._phase:
            lines.append(self._now())
        return Panel(Group(*lines), title=self.title, title_align="left", border_style="dim", padding=(0, 1))

    def _ledger(self) -> Text:
        """The last step's seconds by stage, as a bar and its legend."""
        total = self._row["time/step"]
        bar, legend, before = Text(), Text(no_wrap=True), 0.0
        for stage, colour in zip((*STAGES, "other"), STAGE_COLOURS, strict=True):
            share = self._row.get(f"time/{stage}", 0.0) / total if total > 0 else 0.0
            bar.append("█" * (round(BAR_CELLS * (before + share)) - round(BAR_CELLS * before)), style=colour)
            before += share
            if share >= 0.01:
                legend.append(f" {stage} ", style=colour).append(f"{share:.0%}")
        return Text.assemble(bar, f" {total:.1f} s", legend)

    def _now(self) -> Text:
        progress = f" {self._done}/{self._phase_total}" if self._done is not None and self._phase_total else ""
        return Text.assemble(
            ("now  ", "dim"), f"{self._phase}{progress}", f"  {time.monotonic() - self._phase_begun:.0f} s"
        )


def _clock(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"
