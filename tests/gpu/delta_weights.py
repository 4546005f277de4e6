"""DelTA from a float32 batch, by kernels/delta_weights.py, against the same numbers in float64, by torch.

tests/gpu/kernels.py runs the checks on a GPU, tests/unit/test_kernels_delta.py with the kernels interpreted.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from rltk.algorithms import TokenBatch, build_objective

TOLERANCE = 1e-5  # of a weight, relative


@dataclass(frozen=True)
class Case:
    """A batch of ragged sequences with tool tokens in between.

    advantages: the sequences', in turn. sure: tokens had probabilities of 1 - 1e-4 or so; their states are long, or no
    margins would spread beyond the floor.
    """

    rows: int = 3
    tokens: int = 50
    width: int = 64
    dtype: torch.dtype = torch.float32
    refinements: int = 1
    advantages: tuple[float, ...] = (1.0, -0.5, 0.0)
    sure: bool = False
    seed: int = 0

    def batch(self, device: str = "cpu") -> TokenBatch:
        """NaN under mask 0, in hidden states 99. The sides lie apart, or there would be little to weigh."""
        g = torch.Generator().manual_seed(self.seed)
        shape = self.rows, self.tokens
        old = -torch.randn(*shape, generator=g).abs() * (1e-4 if self.sure else 1)
        length = torch.randint(1, self.tokens + 1, (self.rows, 1), generator=g)
        mask = (torch.arange(self.tokens) < length) & (torch.rand(*shape, generator=g) < 0.8)
        advantage = torch.tensor(self.advantages)[torch.arange(self.rows) % len(self.advantages)]
        hidden = torch.randn(*shape, self.width, generator=g) + 0.3 * advantage[:, None, None]
        hidden *= 1e3 if self.sure else 1
        old = old.masked_fill(~mask, torch.nan)
        hidden = hidden.masked_fill(~mask[..., None], 99.0).to(self.dtype)
        group = torch.zeros(self.rows, dtype=torch.long)
        return TokenBatch(old, old, old, mask, advantage, group, hidden=hidden).to(device)


def check(case: Case, device: str = "cpu") -> float:
    """The greatest relative error of a token's advantage; asserts that it is rounding, and that of the spread too."""
    batch = case.batch(device)
    exact = {name: getattr(batch, name).double() for name in ("new", "old", "mu", "advantage", "hidden")}
    ours, theirs = (build_objective("delta", refinements=case.refinements) for _ in range(2))
    found = ours.prepare(batch).advantage
    expected = theirs.prepare(replace(batch, **exact)).advantage
    assert (found[~batch.mask] == 0).all()
    torch.testing.assert_close(found.double(), expected, rtol=TOLERANCE, atol=0)
    # Of 1 + sd^2 float32 knows 7 digits.
    torch.testing.assert_close(ours._spread.double() ** 2, theirs._spread**2, rtol=TOLERANCE, atol=1e-6)
    torch.testing.assert_close(ours._unread, theirs._unread, rtol=TOLERANCE, atol=0)
    error = (found.double() / expected - 1)[batch.mask & (expected != 0)].abs()
    return error.max().item() if error.numel() else 0.0
