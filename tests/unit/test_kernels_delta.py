"""DelTA's kernels, interpreted, against the torch reference in float64; tests/gpu/kernels.py runs the same on a GPU."""

from __future__ import annotations

import math
import sys
from dataclasses import replace

import pytest
import torch

from rltk.algorithms import build_objective, delta
from tests.gpu.delta_weights import Case, check

# numpy's, of a sigmoid's exp and of states that are not finite
pytestmark = pytest.mark.filterwarnings("ignore:overflow encountered", "ignore:invalid value")


@pytest.fixture(autouse=True)
def kernels(interpreted, monkeypatch):
    """Two programs with a stride over the tiles of a case each, in place of a thousand."""
    module = interpreted("delta_weights")
    monkeypatch.setattr(module, "PROGRAMS", 2)
    monkeypatch.setitem(sys.modules, "rltk.kernels.delta_weights", module)
    monkeypatch.setattr(delta, "_fused", lambda shard: shard.old.dtype == torch.float32)


@pytest.mark.parametrize("refinements", [0, 1, 2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("width", [5, 64, 100])
def test_the_weights_are_those_of_the_reference(width, dtype, refinements):
    assert check(Case(width=width, dtype=dtype, refinements=refinements)) > 0


@pytest.mark.parametrize("advantages", [(1.0, 0.0), (-1.0, 0.0), (2.0, 0.5), (0.0,)])
def test_an_empty_side(advantages):
    check(Case(advantages=advantages))


def test_tokens_that_were_nearly_certain_keep_their_digits():
    check(Case(sure=True))


def test_advantages_by_token_and_tensors_that_do_not_lie_in_order():
    batch = Case(rows=4).batch()
    spread = batch.advantage[:, None].expand(4, 50).clone()
    turned = {name: getattr(batch, name).t().contiguous().t() for name in ("old", "mask")}
    hidden = batch.hidden.transpose(1, 2).contiguous().transpose(1, 2)
    objective = build_objective("delta")
    found = objective.prepare(replace(batch, **turned, hidden=hidden, advantage=spread)).advantage
    assert torch.equal(found, objective.prepare(batch).advantage)


class Recorder:
    """A `reduce` that keeps what each rank brings, and answers with what all of them brought before, if known."""

    def __init__(self, known: list[torch.Tensor] | None = None) -> None:
        self.brought: list[torch.Tensor] = []
        self.known = known

    def __call__(self, value: torch.Tensor) -> torch.Tensor:
        self.brought.append(value.clone())
        return value if self.known is None else self.known[len(self.brought) - 1]


@pytest.mark.parametrize("refinements", [0, 1, 2])
def test_ranks_one_of_them_without_sequences(monkeypatch, refinements):
    """What the ranks bring adds up to what one rank with everything brings, and sets the same weights."""
    objective, batch = build_objective("delta", refinements=refinements), Case(rows=8).batch()
    alone = Recorder()
    whole = objective.prepare(batch, alone)
    ranks = [Recorder(alone.brought) for _ in range(3)]
    rows = [slice(0, 5), slice(5, 5), slice(5, 8)]
    parts = [objective.prepare(batch.select(part), rank) for part, rank in zip(rows, ranks, strict=True)]
    torch.testing.assert_close(torch.cat([part.advantage for part in parts]), whole.advantage)
    for whole_sum, *brought in zip(alone.brought, *(rank.brought for rank in ranks), strict=True):
        torch.testing.assert_close(sum(brought), whole_sum, rtol=1e-5, atol=1e-4)
        assert (brought[1] == 0).all()
    monkeypatch.setattr(delta, "_fused", lambda shard: False)
    reference = Recorder()
    objective.prepare(batch, reference)
    assert [(s.shape, s.dtype) for s in alone.brought] == [(s.shape, s.dtype) for s in reference.brought]


def test_a_step_of_padding():
    batch = replace(Case().batch(), mask=torch.zeros(3, 50))
    assert torch.equal(build_objective("delta").prepare(batch).advantage, torch.zeros(3, 50))


@pytest.mark.parametrize(("value", "refinements"), [(math.nan, 1), (math.inf, 1), (math.nan, 0)])
def test_a_state_that_is_not_finite_is_refused_under_a_mask_of_0_too(value, refinements):
    batch, objective = Case(width=5).batch(), build_objective("delta", refinements=refinements)
    for row, token in (~batch.mask).nonzero()[[0, -1]].tolist():
        hidden = batch.hidden.clone()
        hidden[row, token, 3] = value
        with pytest.raises(ValueError, match="hidden is not finite everywhere"):
            objective.loss(replace(batch, hidden=hidden))
    assert objective.loss(batch)[0].isfinite()
