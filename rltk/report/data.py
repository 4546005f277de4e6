"""Reads what a run left in its folder; most of it may be missing."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rltk.errors import ConfigError


@dataclass(frozen=True)
class Run:
    folder: Path
    metrics: list[dict[str, Any]]  # rows in order of step
    evaluations: list[dict[str, Any]]
    samples: list[dict[str, Any]]
    summary: dict[str, Any]
    manifest: dict[str, Any]
    config: str  # YAML text

    def series(self, name: str) -> tuple[list[float], list[float]]:
        """Steps and values of one metric, at the steps that have it."""
        return _series(self.metrics, name)

    def held_out(self, name: str) -> tuple[list[float], list[float]]:
        return _series(self.evaluations, name)

    def names(self, prefix: str) -> list[str]:
        """Metrics below `prefix`, in the order in which they first appear."""
        return list(dict.fromkeys(key for row in self.metrics for key in row if key.startswith(prefix)))

    @property
    def average(self) -> str | None:
        """The evaluations' sampled accuracy: its name says how many samples, avg@4."""
        names = (key for row in self.evaluations for key in row if key.startswith("avg@") and not key.endswith("_ci"))
        return next(names, None)


def load(folder: Path) -> Run:
    run = Run(
        folder=folder,
        metrics=_rows(folder / "metrics.jsonl"),
        evaluations=_rows(folder / "evaluations.jsonl"),
        samples=_rows(folder / "samples.jsonl"),
        summary=_object(folder / "summary.json"),
        manifest=_object(folder / "manifest.json"),
        config=_text(folder / "config.yaml"),
    )
    if not (run.metrics or run.evaluations or run.summary):
        raise ConfigError(
            f"{folder} holds no metrics.jsonl, evaluations.jsonl or summary.json; name a run's folder, runs/<name>"
        )
    return run


def _series(rows: list[dict[str, Any]], name: str) -> tuple[list[float], list[float]]:
    pairs = [(row["step"], row[name]) for row in rows if isinstance(row.get(name), int | float)]
    return [step for step, _ in pairs], [value for _, value in pairs]


def _rows(path: Path) -> list[dict[str, Any]]:
    lines = _text(path).split("\n")
    if lines and lines[-1]:
        lines.pop()  # the run is writing it, or was killed while it did
    return sorted((json.loads(line) for line in lines if line), key=lambda row: row["step"])


def _object(path: Path) -> dict[str, Any]:
    return json.loads(_text(path) or "{}")


def _text(path: Path) -> str:
    return path.read_text(encoding="utf-8") if path.exists() else ""
