"""Seeds that are functions of the run's seed and a place in it, so that a resumed run draws alike. A leaf."""

from __future__ import annotations

import hashlib


def minibatch_seed(run_seed: int, step: int) -> int:
    """Of the shuffle that makes the minibatches of a training step."""
    return int.from_bytes(hashlib.blake2b(f"{run_seed}/minibatch/{step}".encode(), digest_size=8).digest(), "big")
