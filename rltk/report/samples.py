"""The report's sampled trajectories: the first and the last step that left any, each with its verdict."""

from __future__ import annotations

import re
from html import escape
from typing import Any

from rltk.report.data import Run

SHOWN = 6  # samples a step


def render_samples(run: Run) -> str:
    steps = sorted({row["step"] for row in run.samples})
    if not steps:
        return ""
    parts = []
    for step in dict.fromkeys((steps[0], steps[-1])):
        rows = _mixed([row for row in run.samples if row["step"] == step])
        parts.append(f"<h2>Samples of step {step}</h2><div class='samples'>{''.join(map(_sample, rows))}</div>")
    return "".join(parts)


def verdict(row: dict[str, Any]) -> tuple[str, str]:
    """(words, css class): what the reward said of this sample."""
    if row.get("reward") is None:
        return "– no reward: masked", "muted"
    if row.get("correct") is None:
        return f"reward {row['reward']:.3g}", ""
    if not row["correct"]:
        return "✗ wrong", "bad"
    return ("≈ right answer, wrong step", "warn") if row.get("flawed") else ("✓ right", "good")


def _mixed(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Up to SHOWN rows, taking turns between verdicts, so that each kind that exists is seen."""
    kinds: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        kinds.setdefault(verdict(row)[0], []).append(row)
    depth = max(map(len, kinds.values()))
    turns = [rows[i] for i in range(depth) for rows in kinds.values() if i < len(rows)]
    return turns[:SHOWN]


def _sample(row: dict[str, Any]) -> str:
    words, kind = verdict(row)
    facts = [f"level {row['level']}" if row.get("level") else "", f"{row['tokens']} tokens" if "tokens" in row else ""]
    facts.append("truncated" if row.get("truncated") else "")
    paragraphs = [p for p in re.split(r"\n\s*\n", str(row.get("response", ""))) if p.strip()]
    steps = "".join(
        f"<p class='step{' flaw' if index == row.get('first_flawed') else ''}'>{escape(paragraph.strip())}</p>"
        for index, paragraph in enumerate(paragraphs)
    )
    notes = [f"answer {row['answer']}" if row.get("answer") else "", str(row.get("reason") or "")]
    return (
        f"<div class='sample'><div class='top'><b class='{kind}'>{escape(words)}</b>"
        f"<span class='muted'>{escape(' · '.join(filter(None, facts)))}</span></div>"
        f"<p class='prompt'>{escape(str(row.get('prompt', '')))}</p>{steps}"
        f"<p class='why'>{escape(' · '.join(filter(None, notes)))}</p></div>"
    )
