"""The probe: four short fixed sequences, scored by the engine and by the learner after every sync.

A checksum proves that the bytes arrived. It cannot see a tied head that was not refreshed, a weight repacked wrongly,
or another attention kernel gone astray: only the numbers that come out can.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from rltk.errors import WeightMismatchError

# Prose and code, and no sums: a model that works a sum out is finely balanced between two digits. There fp32 rounding
# moved a log-prob by 4e-5 on one side (float64 against float32, five checkpoints), and a sound engine and learner once
# differed by 1.05e-4; on these texts it moves by 1e-5.
TEXTS = (
    "The quick brown fox jumps over the lazy dog.",
    "All happy families are alike, or so they say.",
    "def f(x):\n    return x * x  # a comment",
    "To be, or not to be: that is the question.",
)
LENGTH = 24  # tokens of a sequence at most
# (largest, mean) difference of a log-prob: rounding apart, the two sides compute the same function.
TOLERANCE = {"float32": (1e-4, 1e-4), "bfloat16": (0.5, 0.03)}


@dataclass(frozen=True)
class ProbeResult:
    largest: float
    mean: float


def compare(
    engine: Sequence[np.ndarray], learner: Sequence[np.ndarray], largest: float, mean: float, what: str
) -> ProbeResult:
    """Raises WeightMismatchError, with the numbers, if the log-probs differ by more than allowed."""
    gaps = np.abs(np.concatenate(list(engine)).astype(np.float64) - np.concatenate(list(learner)).astype(np.float64))
    result = ProbeResult(float(gaps.max()), float(gaps.mean()))
    if not (result.largest <= largest and result.mean <= mean):  # written so that NaN fails
        raise WeightMismatchError(
            f"{what}: log-probs of the probe differ from the learner's by {result.largest:.3g} at most and "
            f"{result.mean:.3g} on average; allowed are {largest:g} and {mean:g}. {_meaning(result, mean)}"
        )
    return result


def _meaning(result: ProbeResult, mean: float) -> str:
    """Rounding in bfloat16 grows with the layers, so a little over its bound may be a deep model's own."""
    if mean < TOLERANCE["bfloat16"][1] or not result.mean <= 3 * mean:
        return (
            "The engine does not run the learner's weights. Fix: report model and vLLM version; sync.probe_max and "
            "sync.probe_mean only hide it."
        )
    bounds = f"sync.probe_mean={2 * result.mean:.1g} sync.probe_max={max(4 * result.largest, 0.5):.1g}"
    return (
        "Either the engine does not run the learner's weights, or bfloat16 rounds this model by so much (SmolLM2-135M, "
        "30 layers: .05). Fix: run once with rollout.dtype=float32 learner.dtype=float32. If that passes, the weights "
        f"are right, and {bounds} are bounds for this model; if it fails, report model and vLLM version."
    )
