"""What a number of samples says about a model: avg@k, pass@k and how sure they are. Pure numpy.

Samples are given as `correct[problem][sample]`: True, False, or None where nobody could tell (masked). Problems may
have different numbers of valid samples.

Confidence intervals are Wilson's, at the effective sample size (Korn and Graubard 1998): the samples of one problem are
alike, so the variance of the mean is taken between problems. With one sample a problem it is the plain Wilson
interval; it stays inside [0, 1], is never empty at 0 % or 100 %, and needs no random numbers.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import NormalDist
from typing import Any

import numpy as np

Correct = Sequence[Sequence[bool | float | None]]


def pass_at_k(samples: int, right: int, k: int) -> float:
    """Chance that at least one of k samples, drawn without replacement from `samples` of which `right` are right, is
    right: 1 - C(samples - right, k) / C(samples, k), the unbiased estimate of arXiv 2107.03374."""
    if not 0 <= right <= samples or not 1 <= k <= samples:
        raise ValueError(
            f"pass@{k} of {samples} samples, {right} right: needs 0 <= right <= samples and 1 <= k <= samples"
        )
    return 1.0 - math.comb(samples - right, k) / math.comb(samples, k)


def mean_interval(
    values: Sequence[float] | np.ndarray, draws: float = 1.0, confidence: float = 0.95
) -> tuple[float, float, float]:
    """(mean, low, high) of per-problem values in [0, 1], the problems being independent.

    `draws`: independent draws that one problem's value averages; the effective sample size is at most problems x draws.
    With all values 0 or all 1 nothing is known of the spread, and the size is the number of problems.
    """
    array = np.asarray(values, dtype=np.float64)
    if array.size == 0 or (array < 0).any() or (array > 1).any():
        raise ValueError("an interval needs at least one value, all of them in [0, 1]")
    mean = float(array.mean())
    variance, bernoulli = float(array.var()), mean * (1 - mean)
    # A value is worth between one throw of a coin (all of its samples agree) and `draws` (as if independent).
    worth = min(draws, bernoulli / variance) if variance > 0 else draws if bernoulli > 0 else 1.0
    size = array.size * max(1.0, worth)
    z = NormalDist().inv_cdf(0.5 + confidence / 2)
    centre = (mean + z**2 / (2 * size)) / (1 + z**2 / size)
    half = z / (1 + z**2 / size) * math.sqrt(bernoulli / size + z**2 / (4 * size**2))
    return mean, max(0.0, centre - half), min(1.0, centre + half)


def evaluate_summary(
    correct: Correct,
    levels: Sequence[str] | None = None,
    greedy: Sequence[bool | float | None] | None = None,
    flawed: Correct | None = None,
    confidence: float = 0.95,
) -> dict[str, Any]:
    """Everything an evaluation reports, in plain JSON types.

    Keys, with n the largest number of samples a problem: "problems", "samples" (n), "masked" (share of samples without
    a verdict), "avg@n" and "avg@n_ci" ([low, high]), "pass@k" and "pass@k_ci" for k = 1, 2, 4, ... up to n (problems
    with fewer than k valid samples are left out), "greedy" and "greedy_ci" (one greedy answer a problem), "flawed"
    (share of flawed ones among the right answers that somebody checked), and "levels": the same for each level.
    A figure without data is absent. Pass@k takes a problem's samples to be independent.
    """
    problems = len(correct)
    for name, other in (("levels", levels), ("greedy", greedy), ("flawed", flawed)):
        if other is not None and len(other) != problems:
            raise ValueError(f"{name} has {len(other)} entries for {problems} problems")
    summary = _figures(correct, greedy, flawed, confidence, max((len(row) for row in correct), default=0))
    if levels is None:
        return summary
    summary["levels"] = {}
    for level in sorted(set(levels)):
        rows = [i for i, name in enumerate(levels) if name == level]
        summary["levels"][level] = _figures(
            [correct[i] for i in rows],
            None if greedy is None else [greedy[i] for i in rows],
            None if flawed is None else [flawed[i] for i in rows],
            confidence,
            summary["samples"],
        )
    return summary


def _figures(
    correct: Correct,
    greedy: Sequence[bool | float | None] | None,
    flawed: Correct | None,
    confidence: float,
    samples: int,
) -> dict[str, Any]:
    drawn = sum(len(row) for row in correct)
    valid = [[float(c) for c in row if c is not None] for row in correct]
    known = [row for row in valid if row]
    figures: dict[str, Any] = {"problems": len(correct), "samples": samples}
    if drawn:
        figures["masked"] = 1.0 - sum(len(row) for row in valid) / drawn
    if known:
        draws = sum(len(row) for row in known) / len(known)
        _put(figures, f"avg@{samples}", mean_interval([sum(row) / len(row) for row in known], draws, confidence))
    k = 1
    while k <= samples:
        enough = [row for row in known if len(row) >= k]
        if enough:
            chances = [pass_at_k(len(row), int(sum(row)), k) for row in enough]
            draws = sum(len(row) // k for row in enough) / len(enough)
            _put(figures, f"pass@{k}", mean_interval(chances, draws, confidence))
        k *= 2
    if greedy is not None:
        verdicts = [float(c) for c in greedy if c is not None]
        if verdicts:
            _put(figures, "greedy", mean_interval(verdicts, 1.0, confidence))
    if flawed is not None:
        checked = [
            bool(flaw)
            for row, flaws in zip(correct, flawed, strict=True)
            for c, flaw in zip(row, flaws, strict=True)
            if c and flaw is not None
        ]
        if checked:
            figures["flawed"] = sum(checked) / len(checked)
    return figures


def _put(figures: dict[str, Any], name: str, interval: tuple[float, float, float]) -> None:
    figures[name] = interval[0]
    figures[f"{name}_ci"] = [interval[1], interval[2]]
