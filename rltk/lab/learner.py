"""The learner's step for a stack of runs: what rltk.learner does with DeepSpeed and ranks, here in plain torch.

    advantages -> minibatches -> old log-probs -> for each minibatch: one pass, one loss a run, one optimizer step

Runs never mix: the losses are summed, so each run's weights get the gradient of its own loss; clipping is by run.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from rltk.algorithms import Objective, TokenBatch, Totals
from rltk.algorithms.distributions import OF_REFERENCE, measure
from rltk.lab.arm import Arm, Settings
from rltk.lab.model import Shape, Weights, causal, hidden_states, logits, select
from rltk.lab.tables import Tables
from rltk.learner.packing import RaggedBatch, minibatches
from rltk.learner.scored import advantages
from rltk.learner.step import accumulate
from rltk.metrics import mismatch

POSITIONS = 100  # of which the mismatch's tail is told apart
VETO = 1e-4  # a sequence with a token of xi = old / mu under it is what correction=sparse drops as a whole
REFERENCE = OF_REFERENCE | {"ref"}  # fields that need the frozen model


class StackLearner:
    """Owns the stacked weights. `broken[r]` is the step at which a run's gradient stopped being finite, or None."""

    def __init__(self, shape: Shape, weights: Weights, arms: Sequence[Arm], settings: Settings, longest: int) -> None:
        self.shape, self.weights, self.settings, self.longest = shape, weights, settings, longest
        self.references = [arm.reference for arm in arms]
        self.objectives = [arm.objective() for arm in arms]
        self.needs = frozenset().union(*(o.needs for o in self.objectives))
        prepares = any(type(o).prepare is not Objective.prepare for o in self.objectives)
        self.of_prepare = frozenset({"hidden", "ref", "entropy"} if prepares else ())
        self.device = next(iter(weights.values())).device
        self.optimizer = torch.optim.AdamW(
            weights.values(), lr=settings.lr, betas=(settings.beta1, settings.beta2), eps=settings.eps,
            weight_decay=settings.weight_decay,
        )  # fmt: skip
        self.start = {name: value.detach()[:1].clone() for name, value in weights.items()}
        self.broken: list[int | None] = [None] * len(arms)
        self.steps = 0

    def train(
        self, batches: Sequence[RaggedBatch], seeds: Sequence[int], noise: bool = False
    ) -> list[dict[str, float]]:
        """One training step of every run; returns each one's metrics. `noise`: measure the gradient's noise as well."""
        scored = [advantages(o, b) for o, b in zip(self.objectives, batches, strict=True)]
        tables = Tables.of(batches, [a for a, _ in scored], self.device)
        lengths = [batch.masked_lengths for batch in batches]
        parts = [minibatches(kept, self.settings.minibatches, s) for (_, kept), s in zip(scored, seeds, strict=True)]
        steps = [
            [p[number] if number < len(p) else np.zeros(0, np.int64) for p in parts]
            for number in range(max(map(len, parts)))
        ]
        self._before(tables, steps)
        gaps = [self._mismatch(tables, run) for run in range(len(batches))]
        if wanted := self.of_prepare & self.needs:
            tables.fields.update(self._figures(tables, wanted))
        sums: list[list[dict[str, Tensor]]] = [[] for _ in batches]
        for number, rows in enumerate(steps):
            totals = [Totals(int(n[r].sum()), len(r), self.longest) for n, r in zip(lengths, rows, strict=True)]
            for run, found in enumerate(self._optimize(tables, rows, totals, number == 0, noise)):
                if found:
                    sums[run].append(found)
        return [gap | means for gap, means in zip(gaps, _means(sums), strict=True)]

    def distance(self, batches: Sequence[RaggedBatch]) -> list[float]:
        """KL(policy || starting weights) in nats a token, estimated on each run's own fresh samples."""
        tables, out = Tables.of(batches, [torch.zeros(len(b.reward)) for b in batches], self.device), []
        for runs, index in self._passes(tables, tables.index([np.arange(len(b.reward)) for b in batches])):
            with torch.no_grad():
                ref = self._forward(tables, runs, index, frozenset({"ref"}))["ref"]
            mask, mu = (tables.fields[name][runs, :, : ref.shape[2]] for name in ("mask", "mu"))
            out += (torch.where(mask, mu - ref, 0.0).sum((1, 2)) / mask.sum((1, 2))).tolist()
        return out

    # -- passes ------------------------------------------------------------------------------------------------------

    def _before(self, tables: Tables, steps: Sequence[Sequence[np.ndarray]]) -> None:
        """Fill in `old`: of every minibatch, or with reference=mu of the first alone."""
        none = np.zeros(0, np.int64)
        for number, rows in enumerate(steps):
            rows = [r if number == 0 or ref == "old" else none for r, ref in zip(rows, self.references, strict=True)]
            for runs, index in self._passes(tables, tables.index(rows)):
                with torch.no_grad():
                    found = self._forward(tables, runs, index, frozenset())["new"]
                at = torch.from_numpy(index).to(self.device)
                run, place = (at >= 0).nonzero(as_tuple=True)
                tables.fields["old"][run + runs.start, at[run, place], : found.shape[2]] = found[run, place]

    def _mismatch(self, tables: Tables, run: int) -> dict[str, float]:
        """Sampler against learner before the step, of the rows that `_before` has seen (rltk.metrics.mismatch).

        `mismatch/unsupported`: share of the sequences with a token that the learner finds at least 1 / VETO times
        rarer than the sampler.
        """
        mask, old, mu = (tables.fields[name][run].cpu() for name in ("mask", "old", "mu"))
        rows = [(m - o)[t].numpy() for t, o, m in zip(mask, old, mu, strict=True) if t.any() and o[t].isfinite().all()]
        if not rows:
            return {}
        unsupported = np.mean([float(row.max()) > -math.log(VETO) for row in rows])
        return {**mismatch(rows, POSITIONS), "mismatch/unsupported": float(unsupported)}

    def _passes(self, tables: Tables, index: np.ndarray) -> list[tuple[slice, np.ndarray]]:
        """(runs, their rows of `index`), each small enough for one pass."""
        if index.shape[1] == 0:
            return []
        step = max(1, self.settings.tokens_per_pass // (index.shape[1] * tables.ids.shape[2]))
        return [(slice(a, min(a + step, len(index))), index[a : a + step]) for a in range(0, len(index), step)]

    def _forward(self, tables: Tables, runs: slice, index: np.ndarray, needs: frozenset[str]) -> dict[str, Tensor]:
        """Per-token figures [runs, W, C] of the rows `index`, C up to the longest of them."""
        longest = tables.longest(index, runs)
        rows = torch.from_numpy(index).clamp(min=0).to(self.device)
        ids = tables.ids[runs].gather(1, rows[..., None].expand(-1, -1, longest))
        weights, width = select(self.weights, runs), index.shape[1]
        hidden = self._hidden(weights, ids, tables.first)
        table = (logits(weights, hidden) / self.settings.temperature).log_softmax(-1)
        target = ids[:, :, tables.first + 1 :].flatten(1)[..., None]
        found = {"new": table.gather(-1, target)[..., 0]}
        with torch.no_grad():
            ref = None
            if needs & REFERENCE:
                ref = self._hidden(self.start, ids.reshape(1, -1, longest), tables.first)
                ref = (logits(self.start, ref) / self.settings.temperature).log_softmax(-1).reshape(table.shape)
                found["ref"] = ref.gather(-1, target)[..., 0]
            wanted = {"entropy"} | (needs & OF_REFERENCE)
            measured = measure(wanted, table.flatten(0, 1), None if ref is None else ref.flatten(0, 1))
            found |= {name: value.reshape(target.shape[:2]) for name, value in measured.items()}
            if "hidden" in needs:
                found["hidden"] = hidden.detach()
        return {name: value.unflatten(1, (width, -1)) for name, value in found.items()}

    def _hidden(self, weights: Weights, ids: Tensor, first: int) -> Tensor:
        """[R, W * C, d]: the states that predict the tokens after `first`."""
        runs, rows, length = ids.shape
        places = torch.arange(length, device=self.device).repeat(runs, rows)
        found = hidden_states(self.shape, weights, ids.flatten(1), places, causal(rows))
        return found.unflatten(1, (rows, length))[:, :, first:-1].flatten(1, 2)

    # -- one optimizer step ------------------------------------------------------------------------------------------

    def _optimize(
        self, tables: Tables, rows: Sequence[np.ndarray], totals: Sequence[Totals], first: bool, noise: bool
    ) -> list[dict[str, Tensor]]:
        """One optimizer step of every run on its `rows`; what each one's objective logged."""
        shards = self._prepare(tables, rows, first)
        found: list[dict[str, Tensor]] = [{} for _ in rows]
        snapshot: list[Tensor] = []
        self.optimizer.zero_grad(set_to_none=True)
        for part in [slice(0, None, 2), slice(1, None, 2)] if noise else [slice(None)]:
            index = tables.index([numbers[part] for numbers in rows])
            for runs, at in self._passes(tables, index):
                figures = self._forward(tables, runs, at, self.needs)
                losses = []
                for run in range(runs.start, runs.stop):
                    if count := len(rows[run][part]):
                        mine = {name: value[run - runs.start, :count] for name, value in figures.items()}
                        loss, logged = self._loss(run, shards[run].select(part), mine, totals[run])
                        losses.append(loss)
                        accumulate(found[run], logged)
                if losses:
                    torch.stack(losses).sum().backward()
            if noise and not snapshot:
                snapshot = [_grad(w).clone() for w in self.weights.values()]
        self._step(found, snapshot)
        return found

    def _prepare(self, tables: Tables, rows: Sequence[np.ndarray], first: bool) -> list[TokenBatch]:
        """Every run's shard of this minibatch after its objective's `prepare`; `new` is filled in after the pass."""
        index = tables.index(rows)
        fields = tables.take(index)
        shards = []
        for run, numbers in enumerate(rows):
            shard = TokenBatch(
                new=fields["old"][run, : len(numbers)],
                **{name: value[run, : len(numbers)] for name, value in fields.items()},
            )
            if len(numbers):
                shard = self.objectives[run].prepare(shard, None, first)
            shards.append(shard)
        return shards

    def _figures(self, tables: Tables, wanted: frozenset[str]) -> dict[str, Tensor]:
        """What `prepare` may read besides the tables: figures [R, B, C, ...] of before the training step."""
        index = np.tile(np.arange(tables.ids.shape[1]), (len(tables.ids), 1))
        columns, out = tables.ids.shape[2] - tables.first - 1, {}
        for runs, at in self._passes(tables, index):
            with torch.no_grad():
                found = self._forward(tables, runs, at, wanted)
            for name in wanted:
                value = found[name] / math.log(self.shape.vocabulary) if name == "entropy" else found[name]
                if name not in out:
                    out[name] = value.new_zeros(*index.shape, columns, *value.shape[3:])
                out[name][runs, :, : value.shape[2]] = value
        return out

    def _loss(
        self, run: int, shard: TokenBatch, mine: dict[str, Tensor], totals: Totals
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The objective on the prepared shard with this pass's figures in it, cut to the pass's columns."""
        objective, columns = self.objectives[run], mine["new"].shape[1]
        cut = {n: v[:, :columns] for n, v in vars(shard).items() if isinstance(v, Tensor) and v.ndim >= 2}
        fresh = {name: mine[name] for name in objective.needs & REFERENCE}
        if "entropy" in objective.needs:
            fresh["entropy"] = mine["entropy"] / math.log(self.shape.vocabulary)
        batch = replace(shard, **cut | fresh | {"new": mine["new"]})
        loss, metrics = objective.loss(batch, totals)
        own = {"entropy": mine["entropy"], "kl/sampler": batch.mu - mine["new"].detach()}
        own = {name: torch.where(batch.mask, value, 0.0).sum() / totals.tokens for name, value in own.items()}
        return loss, {"loss": loss.detach(), **own, **metrics}

    def _step(self, found: list[dict[str, Tensor]], snapshot: list[Tensor]) -> None:
        """Clip each run's gradient by its own norm, and move. One that is not finite counts as zero."""
        grads = [_grad(w) for w in self.weights.values()]
        square = torch.stack([g.flatten(1).square().sum(1) for g in grads]).sum(0)
        norm = square.sqrt()
        noise: Tensor | None = None
        if snapshot:
            gap = torch.stack([(2 * s - g).flatten(1).square().sum(1) for s, g in zip(snapshot, grads, strict=True)])
            noise = gap.sum(0) / square.clamp(min=1e-30)
        scale = (self.settings.max_grad_norm / (norm + 1e-6)).clamp(max=1.0)
        finite = norm.isfinite()
        for weight, grad in zip(self.weights.values(), grads, strict=True):
            shape = [-1] + [1] * (grad.ndim - 1)
            weight.grad = torch.where(finite.reshape(shape), grad * scale.reshape(shape), 0.0)
        self.optimizer.step()
        self.steps += 1
        for run, figures in enumerate(found):
            if figures:
                figures |= {"grad_norm": norm[run]} | ({"gradient/noise": noise[run]} if noise is not None else {})
        for run in (~finite).nonzero()[:, 0].tolist():
            self.broken[run] = self.broken[run] or self.steps


def _grad(weight: Tensor) -> Tensor:
    return torch.zeros_like(weight) if weight.grad is None else weight.grad


def _means(sums: list[list[dict[str, Tensor]]]) -> list[dict[str, float]]:
    """Each run's mean over its optimizer steps; one transfer from the device for all of them."""
    names = [(run, name) for run, steps in enumerate(sums) for name in dict.fromkeys(n for s in steps for n in s)]
    values = []
    for run, name in names:
        column = torch.stack([s[name].double() for s in sums[run] if name in s])
        values.append(column.max() if name.endswith("_max") else column.mean())
    rows: list[dict[str, float]] = [{} for _ in sums]
    for (run, name), value in zip(names, torch.stack(values).tolist() if values else [], strict=True):
        rows[run][name] = value
    return rows
