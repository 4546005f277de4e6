"""Learner: one rank of DeepSpeed training. A plain class; Ray is around it, not in it.

    advantages -> minibatches -> old (and ref) log-probs -> for each minibatch: micro-batches, loss, backward -> step

Every rank is handed the whole batch and computes the same plan, so ranks agree on what to skip and on the number of
micro-batches (a rank that ran fewer would hang ZeRO-3's gathers).
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Collection, Sequence
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from rltk.algorithms import Totals, build_correction, build_objective
from rltk.errors import RltkError
from rltk.learner.deepspeed_config import deepspeed_config, gradient_scale, join, learning_rate, partitioned_loading
from rltk.learner.needs import WITH_REFERENCE, needs_of
from rltk.learner.packing import Packed, RaggedBatch, balance, micro_batches, minibatches, pack
from rltk.learner.policy import Policy, load_model
from rltk.learner.scored import advantage_by_verdict
from rltk.learner.settings import LearnerSettings, TrainResult
from rltk.learner.step import Step, accumulate, mean_of_steps, pack_sequences
from rltk.learner.tables import Tables


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
        self.needs = needs_of(self.objective, settings)
        config = deepspeed_config(settings)
        with partitioned_loading(config, settings.zero_stage == 3):
            model = load_model(settings.model, settings.dtype, settings.gradient_checkpointing)
        policy = Policy(model, settings.temperature, settings.head_chunk)
        optimizer = torch.optim.AdamW(
            policy.parameters(), lr=settings.lr, betas=(settings.beta1, settings.beta2), eps=settings.eps,
            weight_decay=settings.weight_decay,
        )  # fmt: skip
        self.engine: Any = deepspeed.initialize(model=policy, optimizer=optimizer, config=config)[0]
        self.policy, self.device = policy, self.engine.device
        self.reference: Policy | None = None
        if self.needs.reference:  # a second, frozen copy of the starting weights, whole on every rank
            frozen = load_model(settings.model, settings.dtype).requires_grad_(False)
            self.reference = Policy(frozen, settings.temperature, settings.head_chunk).to(self.device)
        self.optimizer_steps = 0
        self._inside = 0.0  # seconds spent inside DeepSpeed's engine

    def train(self, batch: RaggedBatch, seed: int) -> TrainResult:
        """Learn from scored sequences: `settings.minibatches` optimizer steps. `seed` shuffles the minibatches."""
        start, self._inside = time.perf_counter(), 0.0
        step = Step(batch, self.objective, self.needs, self.policy.model, self.device)
        parts = minibatches(step.kept, self.settings.minibatches, seed)
        plan = [self._plan(batch, part) for part in parts]
        self._find_old(batch, self._before(plan), step.tables, self.needs.before)
        if self.needs.ref_before:
            self._find_ref(batch, plan, step.tables)
        scored = time.perf_counter()
        found = [
            self._optimize(step, part, micro, first=number == 0)
            for number, (part, micro) in enumerate(zip(parts, plan, strict=True))
        ]
        return TrainResult(
            metrics=mean_of_steps(found) | advantage_by_verdict(batch, step.advantage, step.kept),
            old=step.tables.arrays("old"),
            new=step.tables.arrays("new"),
            entropy=step.tables.arrays("entropy"),
            trained=[int(s) for s in step.kept],
            tokens=int(batch.lengths[step.kept].sum()),
            seconds={"logprobs": scored - start, "train": time.perf_counter() - scored, "deepspeed": self._inside},
            reference=self.objective.reference,
        )

    def logprobs(self, batch: RaggedBatch) -> list[np.ndarray | None]:
        """Log-probs float32 [n] of each sequence's sampled tokens at the current weights, at the run's temperature;
        None: another rank ran it."""
        tables = Tables(len(batch.reward))
        self._find_old(batch, [self._plan(batch, np.arange(len(batch.reward)))], tables)
        return tables.arrays("old")

    def score(self, sequences: Sequence[Sequence[int]]) -> list[np.ndarray]:
        """Log-probs float32 [n - 1] of each sequence's tokens after the first, at temperature 1 (the probe)."""
        rows = []
        for ids in sequences:
            mask = np.ones(len(ids), bool)
            mask[0] = False
            rows.append((np.asarray(ids), mask))
        packed = pack(rows).to(self.device)
        with torch.no_grad():
            flat = self._forward(packed, temperature=1.0)["logprobs"]
        bounds = np.cumsum([len(ids) - 1 for ids in sequences])[:-1]
        return np.split(flat.cpu().numpy(), bounds)

    # -- before the loss ---------------------------------------------------------------------------------------------

    def _before(self, plan: list[list[list[int]]]) -> list[list[list[int]]]:
        """The minibatches that need `old` before the step. With reference mu only the first, if the objective measures
        something there (else its detached `new` is as good); with old=detach and one optimizer step, none."""
        if self.objective.reference == "mu":
            return plan[:1] if self.needs.prepares else []
        return [] if self.settings.old == "detach" and len(plan) == 1 else plan

    def _plan(self, batch: RaggedBatch, sequences: np.ndarray) -> list[list[int]]:
        """This rank's micro-batches of a minibatch, as sequence numbers; as many on every rank, some may be empty."""
        lengths = batch.lengths[sequences]
        parts = [micro_batches(lengths, p, self.settings.tokens_per_micro_batch) for p in balance(lengths, self.ranks)]
        mine, count = parts[self.rank], max(len(part) for part in parts)
        return [[int(sequences[position]) for position in part] for part in mine] + [[]] * (count - len(mine))

    def _find_old(
        self, batch: RaggedBatch, plan: list[list[list[int]]], tables: Tables, also: Collection[str] = ()
    ) -> None:
        """The policy's log-probs at the current weights, and what `also` names, into `tables`."""
        for sequences in (sequences for micro in plan for sequences in micro):
            with torch.no_grad():
                found = self._forward(pack_sequences(batch, sequences, self.device), also)
            if sequences:
                tables.put(batch.masked_lengths, sequences, old=found.pop("logprobs"), **found)

    def _find_ref(self, batch: RaggedBatch, plan: list[list[list[int]]], tables: Tables) -> None:
        """The reference's log-probs into `tables`. It is whole on every rank, so no rank waits for another."""
        assert self.reference is not None
        for sequences in (sequences for micro in plan for sequences in micro if sequences):
            with torch.no_grad():
                found = self.reference(pack_sequences(batch, sequences, self.device))
            tables.put(batch.masked_lengths, sequences, ref=found["logprobs"])

    def _forward(
        self, packed: Packed, also: Collection[str] = (), temperature: float | None = None
    ) -> dict[str, torch.Tensor]:
        """What `Policy.forward` finds. Under ZeRO-3 the ranks first agree on the number of head calls."""
        chunks = self.policy.chunks(packed)
        if self.settings.zero_stage == 3 and self.ranks > 1:
            agreed = torch.tensor([chunks], device=self.device)
            dist.all_reduce(agreed, op=dist.ReduceOp.MAX)
            chunks = int(agreed)
        reference = self.reference if WITH_REFERENCE.intersection(also) else None
        options = dict(also=also, temperature=temperature, chunks=chunks, reference=reference)
        return self._timed(self.engine, packed, **options)

    def _timed(self, call: Callable[..., Any], *arguments: Any, **options: Any) -> Any:
        """A call into DeepSpeed, counted as such."""
        start = time.perf_counter()
        try:
            return call(*arguments, **options)
        finally:
            self._inside += time.perf_counter() - start

    # -- one optimizer step ------------------------------------------------------------------------------------------

    def _optimize(self, step: Step, part: np.ndarray, micro: list[list[int]], first: bool) -> dict[str, float]:
        """One optimizer step on the sequences `part`, of which this rank runs the micro-batches `micro`."""
        totals = Totals(int(step.batch.masked_lengths[part].sum()), len(part), self.settings.max_response_tokens)
        scale = gradient_scale(self.ranks, self.settings.zero_stage)
        # On every rank, also one without sequences: `prepare` may reduce.
        shard = step.prepare([s for sequences in micro for s in sequences], self._reduce, first)
        row, sums = 0, {}
        for number, sequences in enumerate(micro):
            self.engine.set_gradient_accumulation_boundary(number == len(micro) - 1)
            packed = pack_sequences(step.batch, sequences, self.device)
            found = self._forward(packed, self.needs.in_loss | {"entropy"})  # every run logs its entropy
            if sequences:
                tokens = step.micro_batch(shard, row, sequences, packed, found)
                row += len(sequences)
                step.note(sequences, found, first)
                loss, metrics = self.objective.loss(tokens, totals)
                accumulate(sums, {"loss": loss.detach(), **metrics})
            else:
                loss = found["logprobs"].sum() * 0.0
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
            accumulate(merged, part)
        return merged
