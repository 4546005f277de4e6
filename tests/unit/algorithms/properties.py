"""What holds for every objective, whatever its formula; each test file asks it of its own method.

Batches are `random_batch` with every optional field filled and NaN under mask 0, so whatever reads there shows.
"""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import fields, replace
from importlib.resources import files

import torch
import yaml
from torch import Tensor

from rltk.algorithms import Objective, TokenBatch, Totals, build_objective
from tests.unit.algorithms.tables import random_batch

NO_TOKEN = 3  # the row of `filled_batch(padding=True)` that is padding throughout


def filled_batch(seed: int, rows: int = 6, ratio: float = 0.1, padding: bool = False) -> TokenBatch:
    """Ragged, with tool tokens; entropy and Hellinger distance in [0, 1]; `padding`: one row has no token at all."""
    g = torch.Generator().manual_seed(seed + 1000)
    batch = random_batch(seed, rows=rows, ratio=ratio)
    if padding:
        batch = replace(batch, mask=batch.mask & (torch.arange(rows)[:, None] != NO_TOKEN))
    hidden = ~batch.mask
    extra = {name: torch.rand(batch.new.shape, generator=g, dtype=torch.float64) for name in ("entropy", "hellinger")}
    tokens = {"new": batch.new, "old": batch.old, "mu": batch.mu, "ref": batch.ref, **extra}
    return replace(batch, **{name: value.masked_fill(hidden, torch.nan) for name, value in tokens.items()})


def step(objective: Objective, batch: TokenBatch, totals: Totals | None = None) -> tuple[Tensor, Tensor, dict]:
    """(loss, d loss / d new, metrics) of one optimizer step on one rank, `prepare` included."""
    new = batch.new.detach().clone().requires_grad_()
    loss, metrics = objective.loss(replace(objective.prepare(batch), new=new), totals)
    return loss.detach(), torch.autograd.grad(loss, new)[0], metrics


def check_on_policy(objective: Objective, batch: TokenBatch, advantage: Tensor) -> None:
    """With new = old = mu the gradient is sum_t A_t grad log pi_t: minus the method's own A_t `[B, T]`, aggregated."""
    batch = replace(batch, old=batch.new, mu=batch.new)
    mask, lengths = batch.mask, batch.mask.sum(dim=1, keepdim=True).double()
    sequences = int((lengths > 0).sum())
    share = {
        "token-mean": torch.ones_like(lengths) / mask.sum(),
        "seq-mean-token-mean": 1 / (lengths.clamp(min=1) * sequences),
        "seq-mean-token-sum-norm": torch.ones_like(lengths) / (sequences * 50),
    }[objective.aggregation]
    expected = torch.where(mask, -advantage * share, 0.0)
    _, slopes, _ = step(objective, batch, Totals.of(mask, max_length=50))
    torch.testing.assert_close(slopes, expected, rtol=1e-9, atol=1e-12)
    assert slopes.count_nonzero() == mask.sum()


def check_masked_tokens(objective: Objective, batch: TokenBatch) -> None:
    """Tool tokens and padding are transparent: the batch packed to the left, with one more column, is the same."""
    lengths = batch.mask.sum(dim=1)
    width = int(lengths.max()) + 1
    packed_mask = torch.arange(width) < lengths[:, None]
    packed = {"mask": packed_mask}
    for field in fields(TokenBatch):
        value = getattr(batch, field.name)
        if value is not None and value.ndim == 2 and field.name != "mask":
            packed[field.name] = torch.full((len(value), width), torch.nan, dtype=value.dtype)
            packed[field.name][packed_mask] = value[batch.mask]
    totals = Totals.of(batch.mask, max_length=9)
    loss, slopes, metrics = step(objective, batch, totals)
    other, other_slopes, other_metrics = step(objective, replace(batch, **packed), totals)
    assert loss.isfinite() and all(value.isfinite() for value in metrics.values())
    assert torch.equal(slopes[~batch.mask], torch.zeros(int((~batch.mask).sum()), dtype=torch.float64))
    torch.testing.assert_close(other, loss, rtol=0, atol=1e-12)
    torch.testing.assert_close(other_slopes[packed_mask], slopes[batch.mask], rtol=0, atol=1e-12)
    for name, value in metrics.items():
        torch.testing.assert_close(other_metrics[name], value, rtol=0, atol=1e-12, msg=name)
    prepared = replace(objective.prepare(batch), new=batch.new)
    values, _ = objective.token_loss(prepared)
    assert values.isfinite().all(), "the loss of a token under mask 0 is not finite"


def check_order(objective: Objective, batch: TokenBatch) -> None:
    """The order of sequences, within a group or not, changes nothing but the order of the gradient's rows."""
    order = torch.randperm(len(batch.new), generator=torch.Generator().manual_seed(5))
    loss, slopes, _ = step(objective, batch)
    other, other_slopes, _ = step(objective, batch.select(order))
    torch.testing.assert_close(other, loss, rtol=0, atol=1e-12)
    torch.testing.assert_close(other_slopes, slopes[order], rtol=0, atol=1e-12)


def check_splits(build, batch: TokenBatch, ranks: list[int], cuts: list[int]) -> None:
    """Ranks hold the rows between the edges `ranks` (some may hold none), each in the micro-batches that `cuts` make.

    `build()` gives each rank its own objective; their `prepare` runs side by side with a real sum among them.
    """
    rows = len(batch.new)
    totals = Totals.of(batch.mask, max_length=9)
    loss, slopes, metrics = step(build(), batch, totals)
    edges = [0, *ranks, rows]
    shards = [batch.select(slice(a, b)) for a, b in zip(edges, edges[1:], strict=False)]
    objectives = [build() for _ in shards]
    prepared = prepare_on_ranks(objectives, shards)
    total, grads, merged = torch.zeros(()).double(), [], {}
    for objective, shard, first in zip(objectives, prepared, edges, strict=False):
        inner = sorted({0, len(shard.new), *(c - first for c in cuts if 0 < c - first < len(shard.new))})
        for a, b in zip(inner, inner[1:], strict=False):
            part = shard.select(slice(a, b))
            new = part.new.detach().clone().requires_grad_()
            share, found = objective.loss(replace(part, new=new), totals)
            total = total + share.detach()
            grads.append(torch.autograd.grad(share, new)[0])
            for name, value in found.items():
                merged[name] = [*merged.get(name, []), value]
    torch.testing.assert_close(total, loss, rtol=0, atol=1e-9)
    torch.testing.assert_close(torch.cat(grads), slopes, rtol=0, atol=1e-9)
    for name, value in metrics.items():
        values = torch.stack(merged[name])
        whole = values.max() if name.endswith("_max") else values.sum()
        torch.testing.assert_close(whole, value, rtol=0, atol=1e-9, msg=name)


def prepare_on_ranks(objectives: list[Objective], shards: list[TokenBatch]) -> list[TokenBatch]:
    """`prepare` of every rank at once, each in a thread; a reduction waits for all of them and is their sum."""
    barrier = threading.Barrier(len(shards), timeout=20)
    values: list[Tensor] = [torch.zeros(())] * len(shards)

    def prepare(rank: int) -> TokenBatch:
        def reduce(value: Tensor) -> Tensor:
            values[rank] = value
            barrier.wait()
            total = torch.stack(values).sum(dim=0)
            barrier.wait()
            return total

        return objectives[rank].prepare(shards[rank], reduce)

    with ThreadPoolExecutor(len(shards)) as pool:
        return list(pool.map(prepare, range(len(shards))))


def check_extremes(objective: Objective) -> None:
    """float32 ratios far beyond any clip, both ways, and a token of probability 0."""
    old = torch.tensor([[-900.0, -0.001, -50.0, -1e4]] * 3)
    new = torch.tensor([[-0.001, -900.0, -50.0, -1.0]] * 3)
    full = torch.full_like(old, 0.5)
    batch = TokenBatch(
        new, old, old, torch.ones(3, 4), torch.tensor([1.0, -1.0, 0.0]), torch.zeros(3).long(),
        ref=old, entropy=full, hellinger=full,
    )  # fmt: skip
    loss, slopes, metrics = step(objective, batch)
    assert loss.isfinite() and slopes.isfinite().all() and all(value.isfinite() for value in metrics.values())


def check_equal_rewards(objective: Objective, batch: TokenBatch) -> None:
    """A batch of equal rewards gives exactly no gradient."""
    rewards, valid = torch.full(batch.group.shape, 0.1, dtype=torch.float64), torch.ones(len(batch.group)).bool()
    advantage = objective.advantages(rewards, batch.group, valid)
    _, slopes, _ = step(objective, replace(batch, advantage=advantage))
    assert torch.equal(slopes, torch.zeros_like(slopes))


def check_configuration(name: str) -> None:
    """conf/algorithm/<name>.yaml has the code's options and defaults; what it takes from the run is left out."""
    tree = yaml.safe_load((files("rltk.conf") / "algorithm" / f"{name}.yaml").read_text())
    kind = type(build_objective(name))
    rules = kind.options()
    assert tree.pop("name") == name and tree.pop("minibatches") == kind.default_minibatches == 4
    assert set(tree) == set(rules) - {"reference"}
    own = {key: value for key, value in tree.items() if not str(value).startswith("${")}
    assert {key: rules[key].default for key in own} == own
    assert repr(build_objective(name, **own)) == repr(build_objective(name))
