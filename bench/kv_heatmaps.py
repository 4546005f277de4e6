"""The pictures of bench.kv_quality: needles found by length and depth, and perplexity over the full cache's."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np

FOUND = "viridis"


def draw(
    file: Path,
    found: dict[str, list],
    result: dict[str, Any],
    every: Sequence[Any],
    heads: str,
    contexts: Sequence[int],
) -> None:
    """Rows: full and each policy; columns: budgets; each a heat map of length by depth. Below: perplexities."""
    cells = [cell for cell in every if cell.policy == "full" or cell.heads == heads or cell.policy == "streaming"]
    policies = [policy for policy in dict.fromkeys(cell.policy for cell in cells) if policy != "full"]
    shares = sorted({cell.share for cell in cells if cell.policy != "full"})
    lengths = sorted({row[0] for row in found["full"]})
    depths = sorted({row[1] for row in found["full"]})
    by_place = {(cell.policy, cell.share): cell for cell in cells}
    columns = [*shares, 1.0]
    figure = plt.figure(figsize=(2.1 * len(columns) + 1.2, 1.9 * len(policies) + 3.6), layout="constrained")
    top, bottom = figure.subfigures(2, 1, height_ratios=[1.9 * len(policies), 3.2])
    axes = top.subplots(len(policies), len(columns), squeeze=False, sharex=True, sharey=True)
    image = None
    for row, policy in enumerate(policies):
        for column, share in enumerate(columns):
            axis = axes[row][column]
            cell = by_place[("full", 1.0) if share == 1.0 else (policy, share)]
            shown = share != 1.0 or row == 0
            if not shown:
                axis.set_visible(False)
                continue
            image = axis.imshow(_grid(found[cell.name], lengths, depths), vmin=0, vmax=1, cmap=FOUND, aspect="auto")
            axis.set_facecolor("lightgrey")  # budgets that the engine refuses
            share_found = result[cell.name]["retrieval"]
            number = f"{share_found[0]:.0%} found" if share_found else "refused"
            axis.set_title(f"{'full' if share == 1.0 else f'{policy} {share:.0%}'}: {number}", fontsize=8)
            axis.set_xticks(range(len(lengths)), [f"{length / 1024:.3g}K" for length in lengths], fontsize=7)
            axis.set_yticks([0, len(depths) - 1], ["start", "end"], fontsize=7)
    top.supylabel("depth of the needle", fontsize=9)
    top.suptitle(f"needles found, by length of the prompt; heads: {heads}", fontsize=10)
    if image is not None:
        top.colorbar(image, ax=axes, shrink=0.6, label="share found")
    if contexts:
        _perplexities(bottom, result, by_place, policies, shares, contexts)
    figure.savefig(file, dpi=110)
    plt.close(figure)


def _grid(rows: list, lengths: list[int], depths: list[float]) -> np.ndarray:
    """[depths, lengths] shares; NaN where nothing was asked."""
    grid = np.full((len(depths), len(lengths)), np.nan)
    for column, length in enumerate(lengths):
        for line, depth in enumerate(depths):
            right = [row[2] for row in rows if row[0] == length and row[1] == depth]
            if right:
                grid[line, column] = sum(right) / len(right)
    return grid


def _perplexities(
    figure: Any,
    result: dict[str, Any],
    by_place: dict,
    policies: list[str],
    shares: list[float],
    contexts: Sequence[int],
) -> None:
    axes = figure.subplots(1, len(contexts), squeeze=False, sharey=True)[0]
    for axis, context in zip(axes, contexts, strict=True):
        for number, policy in enumerate(policies):
            cells = [by_place[policy, share] for share in shares if (policy, share) in by_place]
            known = [(c.share, result[c.name].get(f"perplexity_over_full_{context}")) for c in cells]
            known = [(share, values) for share, values in known if values]
            if known:
                x = [share * 100 * 1.02 ** (number - 1.5) for share, _ in known]  # side by side
                middle, low, high = np.array([values for _, values in known]).T
                axis.errorbar(x, middle, [middle - low, high - middle], marker="o", ms=3, capsize=2, label=policy)
        axis.axhline(1, color="grey", lw=0.8)
        axis.set_xscale("log")
        axis.set_xticks([share * 100 for share in shares], [f"{share:.0%}" for share in shares])
        axis.minorticks_off()
        axis.set_xlabel(f"budget, of a prompt of {context} tokens", fontsize=8)
    axes[0].set_ylabel("perplexity / full's", fontsize=9)
    axes[0].legend(fontsize=7)
