"""Objectives of policy-gradient post-training in plain torch: a `TokenBatch` in, `(loss, metrics)` out.

    objective = build_objective("ctpo", clip_high=0.05, correction=build_correction("tis"))
    loss, metrics = objective.loss(batch, totals)

Adding one is adding a file: `algorithms/<name>.py` with a subclass of `Objective` (and conf/algorithm/<name>.yaml),
or a class of your own anywhere, named as `my_module:MyObjective`.
"""

from __future__ import annotations

from typing import Any

from rltk.algorithms.advantages import valid_groups
from rltk.algorithms.batch import TokenBatch, Totals
from rltk.algorithms.corrections import build_correction
from rltk.algorithms.corrections.correction import Correction
from rltk.algorithms.objective import Objective
from rltk.algorithms.options import option
from rltk.algorithms.registry import find_class

__all__ = [
    "Correction", "Objective", "TokenBatch", "Totals", "build_correction", "build_objective", "option", "valid_groups",
]  # fmt: skip


def build_objective(name: str, *, correction: Correction | None = None, **options: Any) -> Objective:
    """The objective that module `rltk.algorithms.<name>` defines, or the user's own `module:Class`.

    Options common to all, each with the method's own default: clip_low, clip_high, dual_clip, beta, kl, std, ddof,
    eps, min_group, aggregation, reference; the rest are the method's (`options()` of its class lists them). Raises
    ValueError for an unknown name or option (the nearest known one is named), a value out of range, a correction
    together with reference=mu.
    """
    return find_class(name, __name__, Objective)(correction=correction, **options)
