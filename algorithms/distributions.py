"""Figures of whole next-token distributions, over log-probs of a chunk of tokens, `[n, V]` -> `[n]`.

Every function takes normalised log-probs (`logits.log_softmax(-1)`), in float32 or float64, and keeps the dtype; a
token of probability 0 (log-prob -inf) is allowed. The caller cuts its tokens into chunks, so that no
`[tokens, vocabulary]` tensor exists at once.
"""

from __future__ import annotations

from collections.abc import Collection

import torch
from torch import Tensor

MEASURES = ("entropy", "hellinger", "forward_kl")  # as the fields of `TokenBatch` are called
OF_REFERENCE = frozenset({"hellinger", "forward_kl"})  # those that compare with the reference


def entropy(new: Tensor) -> Tensor:
    """Entropy of each distribution, `[n]`, in nats, never negative. new `[n, V]` log-probs."""
    return torch.special.entr(new.exp()).sum(dim=-1).clamp(min=0.0)


def hellinger(new: Tensor, ref: Tensor) -> Tensor:
    """Squared Hellinger distance 1 - sum_v sqrt(p q), `[n]`, in [0, 1], symmetric. new, ref `[n, V]` log-probs.

    Summed as 1/2 sum_v (sqrt p - sqrt q)^2, which is the same number: policies a few steps apart are at a distance of
    1e-6, where 1 minus a sum near 1 has no correct digit left in float32.
    """
    return 0.5 * ((0.5 * new).exp() - (0.5 * ref).exp()).square().sum(dim=-1)


def forward_kl(new: Tensor, ref: Tensor) -> Tensor:
    """KL(ref || new), `[n]`, in nats; infinite where ref allows a token that new does not. new, ref `[n, V]` log-probs.

    The sum of q log(q / p) has p - q added to each term: it adds up to 0, and takes out the error of first order that
    rounding of the two normalisers leaves.
    """
    p, q = new.exp(), ref.exp()
    return torch.where(q > 0, q * (ref - new) + p - q, p).sum(dim=-1)


def measure(names: Collection[str], new: Tensor, ref: Tensor | None = None) -> dict[str, Tensor]:
    """Those of MEASURES in `names`, each `[n]`. new, ref `[n, V]` log-probs; ref only for those of OF_REFERENCE.

    Raises ValueError for an unknown name, for a missing reference and for log-probs in half precision.
    """
    if unknown := sorted(set(names) - set(MEASURES)):
        raise ValueError(f"unknown measures {', '.join(unknown)}; known: {', '.join(MEASURES)}")
    if new.dtype not in (torch.float32, torch.float64):
        raise ValueError(f"log-probs are {new.dtype}; take them in float32: half precision hides small distances")
    found = {"entropy": entropy(new)} if "entropy" in names else {}
    compare = {"hellinger": hellinger, "forward_kl": forward_kl}
    for name in (name for name in MEASURES if name in names and name in OF_REFERENCE):
        if ref is None:
            raise ValueError(f"{name} compares with a reference, but ref is None")
        found[name] = compare[name](new, ref)
    return found
