"""Learner: one rank of DeepSpeed training. A plain class; Ray is around it, not in it.

    advantages -> minibatches -> old (and ref) log-probs -> for each minibatch: micro-batches, loss, backward -> step

Every rank is handed the whole batch and computes the same plan, so ranks agree on what to skip and on the number of
micro-batches (a rank that ran fewer would hang ZeRO-3's gathers).
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import fields, replace
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from rltk.algorithms import Objective, TokenBatch, Totals, build_correction, build_objective, valid_groups
from rltk.errors import ConfigError, RltkError
from rltk.learner.deepspeed_config import deepspeed_config, gradient_scale, join, learning_rate, partitioned_loading
from rltk.learner.packing import Packed, RaggedBatch, balance, micro_batches, minibatches, pack
from rltk.learner.policy import Policy, load_model
from rltk.learner.settings import LearnerSettings, TrainResult
from rltk.learner.tables import Tables, groups_of


class Learner:
    """`rank` of `ranks`; `host:port` is where the ranks meet. All ranks call the same methods in the same order."""

    def __init__(self, settings: LearnerSettings, rank: int, ranks: int, host: str, port: int) -> None:
        import deepspeed

        self.settings, self.rank, self.ranks = settings, rank, ranks
        if settings.threads:
            torch.set_num_threads(settings.threads)
        join(rank, ranks, host, port, settings.device)
        correction = build_correction(settings.correction, **settings.correction_options)
        self.objective = build_objective(
            settings.algorithm, correction=correction, **{"reference": settings.reference, **settings.algorithm_options}
        )
        prepares = type(self.objective).prepare is not Objective.prepare or correction.batch_statistic
        if settings.old == "detach" and prepares:
            raise ConfigError(
                f"learner.old=detach skips the pass that algorithm={settings.algorithm} needs before its loss. "
                "Fix: learner.old=recompute."
            )
        config = deepspeed_config(settings)
        with partitioned_loading(config, settings.zero_stage == 3):
            model = load_model(settings.model, settings.dtype, settings.gradient_checkpointing)
        policy = Policy(model, settings.temperature, settings.head_chunk)
        self.vocabulary = int(policy.model.config.vocab_size)  # type: ignore[union-attr]
        optimizer = torch.optim.AdamW(
            policy.parameters(), lr=settings.lr, betas=(settings.beta1, settings.beta2), eps=settings.eps,
            weight_decay=settings.weight_decay,
        )  # fmt: skip
        self.engine, *_ = deepspeed.initialize(model=policy, optimizer=optimizer, config=config)
        self.policy, self.device = policy, self.engine.device
        self.reference: Policy | None = None
        if "ref" in self.objective.needs:  # a second, frozen copy of the starting weights, whole on every rank
            frozen = load_model(settings.model, settings.dtype).requires_grad_(False)
            self.reference = Policy(frozen, settings.temperature, settings.head_chunk).to(self.device)
        self.optimizer_steps = 0
        self._inside = 0.0  # seconds spent inside DeepSpeed's engine

    def train(self, batch: RaggedBatch, seed: int) -> TrainResult:
        """Learn from scored sequences: `settings.minibatches` optimizer steps. `seed` shuffles the minibatches."""
        start, self._inside = time.perf_counter(), 0.0
        tables, metrics = Tables(len(batch.reward)), {}
        advantage, kept = self._advantages(batch)
        parts = minibatches(kept, self.settings.minibatches, seed)
        plan = [self._plan(batch, part) for part in parts]
        for micro in self._before(plan):
            for sequences in micro:
                packed = self._pack(batch, sequences)
                with torch.no_grad():
                    old, entropy = self._forward(packed)
                if sequences:
                    tables.put(batch.masked_lengths, sequences, old=old, entropy=entropy)
        known = list(tables.columns["old"])
        if self.reference is not None:
            for sequences in (s for micro in plan for s in micro if s):
                with torch.no_grad():
                    ref, _ = self.reference(self._pack(batch, sequences))
                tables.put(batch.masked_lengths, sequences, ref=ref)
        scored = time.perf_counter()
        steps = [
            self._optimize(batch, part, micro, advantage, tables, first=number == 0)
            for number, (part, micro) in enumerate(zip(parts, plan, strict=True))
        ]
        for name in {name for step in steps for name in step}:
            values = [step[name] for step in steps if name in step]
            metrics[name] = max(values) if name.endswith("_max") else float(np.mean(values))
        metrics["optimizer_steps"] = float(len(steps))
        return TrainResult(
            metrics=metrics,
            # Under reference=mu most sequences have no log-probs of before the step; a later `new` is no substitute.
            old=tables.columns["old"] if self.settings.reference == "old" else known,
            new=tables.columns["new"],
            entropy=tables.columns["entropy"],
            trained=[int(s) for s in kept],
            tokens=int(batch.lengths[kept].sum()),
            seconds={"logprobs": scored - start, "train": time.perf_counter() - scored, "deepspeed": self._inside},
        )

    def score(self, sequences: Sequence[Sequence[int]]) -> list[np.ndarray]:
        """Log-probs float32 [n - 1] of each sequence's tokens after the first, at temperature 1 (the probe)."""
        rows = []
        for ids in sequences:
            mask = np.ones(len(ids), bool)
            mask[0] = False
            rows.append((np.asarray(ids), mask))
        packed = pack(rows).to(self.device)
        with torch.no_grad():
            flat, _ = self._forward(packed, temperature=1.0)
        bounds = np.cumsum([len(ids) - 1 for ids in sequences])[:-1]
        return np.split(flat.float().cpu().numpy(), bounds)

    # -- before the loss ---------------------------------------------------------------------------------------------

    def _advantages(self, batch: RaggedBatch) -> tuple[torch.Tensor, np.ndarray]:
        """Advantages [B] of the whole batch, and the numbers of the sequences to learn from."""
        reward = torch.full((len(batch.reward),), torch.nan)
        for members, samples in groups_of(batch):
            shaped = self.objective.shape_rewards(samples)
            reward[torch.from_numpy(members)] = torch.tensor([math.nan if v is None else float(v) for v in shaped])
        group = torch.from_numpy(batch.group)
        valid = torch.isfinite(reward) & torch.from_numpy(batch.masked_lengths > 0)
        kept = valid_groups(group, valid, self.objective.min_group)
        return self.objective.advantages(torch.nan_to_num(reward), group, valid), kept.nonzero()[:, 0].numpy()

    def _before(self, plan: list[list[list[int]]]) -> list[list[list[int]]]:
        """The minibatches that need `old` before the step. With reference mu only the first, for what the objective
        measures there (the rest take the detached `new`); with old=detach and one optimizer step, none."""
        if self.settings.reference == "mu":
            return plan[:1]
        return [] if self.settings.old == "detach" and len(plan) == 1 else plan

    def _plan(self, batch: RaggedBatch, sequences: np.ndarray) -> list[list[int]]:
        """This rank's micro-batches of a minibatch, as sequence numbers; as many on every rank, some may be empty."""
        lengths = batch.lengths[sequences]
        parts = [micro_batches(lengths, p, self.settings.tokens_per_micro_batch) for p in balance(lengths, self.ranks)]
        mine, count = parts[self.rank], max(len(part) for part in parts)
        return [[int(sequences[position]) for position in part] for part in mine] + [[]] * (count - len(mine))

    def _pack(self, batch: RaggedBatch, sequences: Sequence[int]) -> Packed:
        """An empty micro-batch runs two tokens of the first sequence, so that every rank makes the same calls."""
        rows = [(batch.ids[batch.sequence(s)], batch.mask[batch.sequence(s)]) for s in sequences]
        return pack(rows or [(batch.ids[:2], np.asarray([False, True]))]).to(self.device)

    def _forward(self, packed: Packed, temperature: float | None = None) -> tuple[torch.Tensor, torch.Tensor]:
        """Log-probs and entropies [M]. Under ZeRO-3 the ranks first agree on the number of head calls."""
        chunks = self.policy.chunks(packed)
        if self.settings.zero_stage == 3 and self.ranks > 1:
            agreed = torch.tensor([chunks], device=self.device)
            dist.all_reduce(agreed, op=dist.ReduceOp.MAX)
            chunks = int(agreed)
        return self._timed(self.engine, packed, entropy=True, temperature=temperature, chunks=chunks)

    def _timed(self, call: Callable[..., Any], *arguments: Any, **options: Any) -> Any:
        """A call into DeepSpeed, counted as such."""
        start = time.perf_counter()
        try:
            return call(*arguments, **options)
        finally:
            self._inside += time.perf_counter() - start

    # -- one optimizer step ------------------------------------------------------------------------------------------

    def _optimize(
        self,
        batch: RaggedBatch,
        part: np.ndarray,
        micro: list[list[int]],
        advantage: torch.Tensor,
        tables: Tables,
        first: bool,
    ) -> dict[str, float]:
        """One optimizer step on the sequences `part`, of which this rank runs the micro-batches `micro`."""
        totals = Totals(int(batch.masked_lengths[part].sum()), len(part), self.settings.max_response_tokens)
        scale = gradient_scale(self.ranks, self.settings.zero_stage)
        mine = [s for sequences in micro for s in sequences]
        row, sums = 0, {}
        # On every rank, also one without sequences: `prepare` may reduce.
        whole = self._token_batch(batch, self._pack(batch, mine), mine, advantage, tables)
        shard = self.objective.prepare(whole, self._reduce, first)
        for number, sequences in enumerate(micro):
            self.engine.set_gradient_accumulation_boundary(number == len(micro) - 1)
            packed = self._pack(batch, sequences)
            new, entropy = self._forward(packed)
            if sequences:
                tables.put(batch.masked_lengths, sequences, new=new.detach(), entropy=entropy)
                if not tables.has("old", sequences):
                    tables.put(batch.masked_lengths, sequences, old=new.detach())
                tokens = self._token_batch(batch, packed, sequences, advantage, tables, new)
                tokens = _prepared(tokens, shard, slice(row, row + len(sequences)))
                row += len(sequences)
                loss, found = self.objective.loss(tokens, totals)
                _accumulate(sums, {"loss": loss.detach(), **found})
            else:
                loss = new.sum() * 0.0
            self._timed(self.engine.backward, loss * scale, scale_wrt_gas=False)
        return self._merge(sums) | self._step()

    def _step(self) -> dict[str, float]:
        rate = learning_rate(self.settings, self.optimizer_steps)
        for group in self.engine.optimizer.param_groups:
            group["lr"] = rate
        norm: Any = None
        if self.settings.zero_stage == 0 and self.settings.dtype == "float32":
            # DeepSpeed keeps no norm on this path. Gradients are already reduced: the boundary backward did it.
            norm = torch.stack([p.grad.norm() for p in self.policy.parameters() if p.grad is not None]).norm()
        self._timed(self.engine.step)
        self.optimizer_steps += 1
        norm = float(self.engine.get_global_grad_norm() if norm is None else norm)
        if not math.isfinite(norm):
            raise RltkError(
                f"gradient norm is {norm} at optimizer step {self.optimizer_steps}: the weights are no longer usable. "
                "Fix: resume from the last checkpoint with a lower learner.lr or learner.dtype=float32."
            )
        return {"lr": rate, "grad_norm": norm, "clip/gradient": float(norm > self.settings.max_grad_norm)}

    def _token_batch(
        self,
        batch: RaggedBatch,
        packed: Packed,
        sequences: Sequence[int],
        advantage: torch.Tensor,
        tables: Tables,
        new: torch.Tensor | None = None,
    ) -> TokenBatch:
        """The objective's view of these sequences; `new` None: before any forward, where `old` stands for it."""
        sampled = [batch.mu[batch.sequence(s)][batch.mask[batch.sequence(s)]] for s in sequences]
        mu = torch.from_numpy(np.concatenate(sampled)) if sampled else torch.zeros(0)
        rows, needs = torch.tensor(list(sequences), dtype=torch.long), self.objective.needs
        # A rank without sequences still takes part in the reductions of `prepare`, with no rows.
        count = slice(0, len(sequences))

        def table(flat: torch.Tensor) -> torch.Tensor:
            return (
                packed.table(flat.to(self.device))[count] if len(sequences) else torch.zeros(0, 1, device=self.device)
            )

        # Before the first forward under reference=mu (or old=detach) there is no `old`; mu stands for it, and no
        # objective reads it then but on the step's first minibatch, where it is known.
        old = table(tables.flat("old", sequences) if tables.has("old", sequences) else mu)
        entropy = table(tables.flat("entropy", sequences)) / math.log(self.vocabulary) if "entropy" in needs else None
        return TokenBatch(
            new=old if new is None else packed.table(new),
            old=old,
            mu=table(mu),
            mask=table(torch.ones(len(mu))) > 0,
            advantage=advantage[rows].to(self.device),
            group=torch.from_numpy(batch.group)[rows].to(self.device),
            ref=table(tables.flat("ref", sequences)) if self.reference is not None else None,
            entropy=entropy,
            reward=torch.from_numpy(batch.reward)[rows].to(self.device),
        )

    # -- over ranks --------------------------------------------------------------------------------------------------

    def _reduce(self, value: torch.Tensor) -> torch.Tensor:
        """The sum of a tensor over ranks."""
        value = value.detach().clone()
        dist.all_reduce(value)
        return value

    def _merge(self, sums: dict[str, torch.Tensor]) -> dict[str, float]:
        """Metrics of one optimizer step: they add up over ranks, `_max` ones excepted."""
        mine = {name: float(value) for name, value in sums.items()}
        parts: list[Any] = [None] * self.ranks
        dist.all_gather_object(parts, mine)
        merged: dict[str, float] = {}
        for part in parts:
            _accumulate(merged, part)
        return merged


def _accumulate(sums: dict[str, Any], found: dict[str, Any]) -> None:
    for name, value in found.items():
        if name not in sums:
            sums[name] = value
        else:
            sums[name] = max(sums[name], value) if name.endswith("_max") else sums[name] + value


def _prepared(tokens: TokenBatch, shard: TokenBatch, rows: slice) -> TokenBatch:
    """`tokens` with whatever `prepare` made of its rows; the shard's table is as wide as its longest sequence."""
    width = tokens.new.shape[1]
    part = shard.select(rows)
    changed = {}
    for field in fields(TokenBatch):
        value = getattr(part, field.name)
        if field.name not in ("new", "old") and value is not None:
            changed[field.name] = value[:, :width] if value.ndim >= 2 else value
    return replace(tokens, **changed)
