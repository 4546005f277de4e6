"""The known word that a mistyped one most likely meant."""

from __future__ import annotations

from collections.abc import Iterable
from difflib import SequenceMatcher, get_close_matches


def nearest(word: str, known: Iterable[str]) -> str | None:
    """The known word closest to `word`, or None where nothing comes near."""
    found = get_close_matches(word, list(known), n=1, cutoff=0.5)
    return found[0] if found else None


def nearest_key(key: str, known: Iterable[str]) -> str | None:
    """The dotted key closest to `key`. The last part counts most: `lr` means `learner.lr`, whatever its length."""

    def likeness(candidate: str) -> float:
        parts = (key.rsplit(".", 1)[-1], candidate.rsplit(".", 1)[-1])
        last = SequenceMatcher(None, *parts).ratio()
        return 0.7 * last + 0.3 * SequenceMatcher(None, key, candidate).ratio()

    best = max(known, key=likeness, default=None)
    return best if best is not None and likeness(best) >= 0.5 else None


def meant(word: str, known: Iterable[str]) -> str:
    """` (did you mean X?)`, or nothing: for an error message."""
    found = nearest(word, known)
    return f" (did you mean {found}?)" if found else ""
