"""The figures of bench.kv_quality: shares and perplexities with their 95 % intervals, by cell, and as a table."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np


def wilson(right: int, count: int, z: float = 1.96) -> list[float]:
    """[share, low, high] of a binomial share."""
    if count == 0:
        return [math.nan] * 3
    share = right / count
    middle = (share + z * z / (2 * count)) / (1 + z * z / count)
    half = z / (1 + z * z / count) * math.sqrt(share * (1 - share) / count + z * z / (4 * count * count))
    return [share, max(0.0, middle - half), min(1.0, middle + half)]


def bootstrap(losses: Sequence[float], base: Sequence[float] | None = None, draws: int = 2000) -> list[float]:
    """[exp(mean), low, high] over pieces; with `base`, of the ratio to it, piece by piece."""
    values = np.asarray(losses) - (0.0 if base is None else np.asarray(base))
    means = values[np.random.default_rng(0).integers(0, len(values), (draws, len(values)))].mean(1)
    low, high = np.quantile(means, [0.025, 0.975])
    return [float(np.exp(each)) for each in (values.mean(), low, high)]


def figures(found: dict[str, list], read: dict[str, list], every: Sequence[Any], contexts: Sequence[int]) -> dict:
    """Per cell: retrieval over all needles and by length; perplexity, and its ratio to full's, by context."""
    result: dict[str, Any] = {}
    for cell in every:
        rows, losses = found[cell.name], read[cell.name]
        by_length = {length: [row[2] for row in rows if row[0] == length] for length in sorted({r[0] for r in rows})}
        entry: dict[str, Any] = {"policy": cell.policy, "share": cell.share, "heads": cell.heads}
        entry["retrieval"] = wilson(sum(row[2] for row in rows), len(rows)) if rows else None
        entry["digits"] = sum(row[3] for row in rows) / (7 * len(rows)) if rows else None
        entry["retrieval_by_length"] = {length: wilson(sum(each), len(each)) for length, each in by_length.items()}
        for context in contexts:
            here = [row[2] for row in losses if row[0] == context]
            full = [row[2] for row in read["full"] if row[0] == context]
            if here:
                entry[f"perplexity_{context}"] = bootstrap(here)
                entry[f"perplexity_over_full_{context}"] = bootstrap(here, full)
        result[cell.name] = entry
    return result


def table(result: dict[str, Any], contexts: Sequence[int]) -> str:
    """Markdown: a row a cell; needles found by length and in all, perplexity and its ratio to the full cache's."""
    lengths = list(result["full"]["retrieval_by_length"])
    heads = ["cache", *(f"found in {length}" for length in lengths), "found in all"]
    for context in contexts:
        heads += [f"perplexity after {context}", "over full's"]
    lines = [heads, ["---"] * len(heads)]
    for name, entry in result.items():
        found = [entry["retrieval_by_length"].get(length) for length in lengths]
        row = [name, *(_interval(each, 100, "%.0f (%.0f-%.0f)") for each in [*found, entry["retrieval"]])]
        for context in contexts:
            row.append(_interval(entry.get(f"perplexity_{context}"), 1, "%.1f (%.1f-%.1f)"))
            row.append(_interval(entry.get(f"perplexity_over_full_{context}"), 1, "%.2f (%.2f-%.2f)"))
        lines.append(row)
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _interval(values: list[float] | None, scale: float, form: str) -> str:
    return "" if values is None else form % tuple(scale * value for value in values)
