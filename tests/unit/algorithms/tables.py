"""Tiny policies whose every sequence can be listed, and batches to feed an objective with. float64 throughout."""

from __future__ import annotations

import itertools
from dataclasses import replace

import torch
from torch import Tensor

from rltk.algorithms import TokenBatch


class Table:
    """An autoregressive policy over `vocabulary` tokens: one row of logits for each prefix, `steps` tokens long."""

    def __init__(self, seed: int, vocabulary: int = 3, steps: int = 3, scale: float = 1.0) -> None:
        self.vocabulary, self.steps = vocabulary, steps
        rows = sum(vocabulary**t for t in range(steps))
        generator = torch.Generator().manual_seed(seed)
        self.logits = scale * torch.randn(rows, vocabulary, generator=generator, dtype=torch.float64)

    def near(self, seed: int, scale: float) -> Table:
        """Another policy at a distance that `scale` sets."""
        other = Table(seed, self.vocabulary, self.steps, scale)
        other.logits = other.logits + self.logits
        return other

    def sequences(self) -> Tensor:
        """Every sequence, `[V^T, T]`."""
        return torch.tensor(list(itertools.product(range(self.vocabulary), repeat=self.steps)))

    def logprobs(self, sequences: Tensor, logits: Tensor | None = None) -> Tensor:
        """Log-probability of each token given its prefix, `[N, T]`; `logits`: other parameters of the same shape."""
        table = (self.logits if logits is None else logits).log_softmax(dim=-1)
        columns, first, row = [], 0, torch.zeros(len(sequences), dtype=torch.long)
        for t in range(self.steps):
            columns.append(table[first + row, sequences[:, t]])
            first += self.vocabulary**t
            row = row * self.vocabulary + sequences[:, t]
        return torch.stack(columns, dim=1)


def make_batch(
    new: Tensor, old: Tensor, advantage: Tensor, mu: Tensor | None = None, mask: Tensor | None = None
) -> TokenBatch:
    """A batch of one group; everything is masked in and mu = old unless given."""
    return TokenBatch(
        new=new,
        old=old,
        mu=old if mu is None else mu,
        mask=torch.ones_like(old, dtype=torch.bool) if mask is None else mask,
        advantage=advantage,
        group=torch.zeros(len(new), dtype=torch.long),
    )


def random_batch(seed: int, rows: int = 6, length: int = 7, spread: float = 0.3, ratio: float = 0.1) -> TokenBatch:
    """Ragged masks with holes (tool tokens); new, old, mu differ by `ratio`; what the mask hides is NaN or infinite."""
    g = torch.Generator().manual_seed(seed)

    def noise(scale: float) -> Tensor:
        return scale * torch.randn(rows, length, generator=g, dtype=torch.float64)

    mu = -1.5 + noise(spread)
    old = mu + noise(ratio)
    mask = torch.rand(rows, length, generator=g) < 0.7
    mask[:, 2] = True
    batch = TokenBatch(
        new=old + noise(ratio),
        old=old,
        mu=mu,
        mask=mask,
        advantage=torch.randn(rows, generator=g, dtype=torch.float64),
        group=torch.arange(rows) // 2,
        ref=mu + noise(ratio),
    )
    hidden = ~mask
    return replace(
        batch,
        new=batch.new.masked_fill(hidden, torch.nan),
        old=batch.old.masked_fill(hidden, -torch.inf),
        mu=batch.mu.masked_fill(hidden, torch.nan),
    )


def with_needs(batch: TokenBatch, seed: int = 0, width: int = 4) -> TokenBatch:
    """Every optional field filled as a learner and a driver would, with NaN under mask 0. `width`: of `hidden`, which
    must be finite everywhere and is 99 there."""
    g = torch.Generator().manual_seed(seed + 2000)

    def rand(*more: int) -> Tensor:
        return torch.rand(*batch.mask.shape, *more, generator=g, dtype=torch.float64)

    tokens = {"ref": batch.mu + 0.2 * rand(), "entropy": rand(), "hellinger": rand(), "forward_kl": rand()}
    hidden = (4 * rand(width) - 2).masked_fill(~batch.mask[..., None], 99.0)
    rates = torch.tensor([0.5, 0.0, 0.75, 1.0]).double()[batch.group % 4]  # of the whole group, so alike within one
    return replace(
        batch,
        **{name: value.masked_fill(~batch.mask, torch.nan) for name, value in tokens.items()},
        hidden=hidden,
        reward=(batch.advantage > 0).double(),
        pass_rate=rates,
        group_length=torch.where(rates > 0, 2.0 + rates, torch.inf),
    )


def gradient(objective, batch: TokenBatch, totals=None) -> Tensor:
    """d loss / d new, `[B, T]`."""
    new = batch.new.detach().clone().requires_grad_()
    objective.loss(replace(batch, new=new), totals)[0].backward()
    assert new.grad is not None
    return new.grad
