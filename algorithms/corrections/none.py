"""No correction: the sampler is taken to be the learner, or the ratio itself is taken against the sampler."""

from __future__ import annotations

import torch
from torch import Tensor

from rltk.algorithms.batch import TokenBatch
from rltk.algorithms.corrections.correction import Correction


class NoCorrection(Correction):
    """Weight 1, everything kept."""

    def __call__(self, batch: TokenBatch) -> tuple[Tensor, Tensor]:
        return torch.ones_like(batch.old), torch.ones_like(batch.mask)
