"""Corrections of the sampler's error, one a file. `build_correction("tis", cap=2.0)(batch) -> (weight, kept)`."""

from __future__ import annotations

from typing import Any

from rltk.algorithms.corrections.correction import Correction
from rltk.algorithms.registry import find_class


def build_correction(name: str, **options: Any) -> Correction:
    """The correction that module `rltk.algorithms.corrections.<name>` defines, or the user's own `module:Class`.

    Raises ValueError for an unknown name or option (the nearest known one is named) and for a value out of range.
    """
    return find_class(name, __name__, Correction)(**options)
