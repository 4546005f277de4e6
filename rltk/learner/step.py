"""One training step's sequences, what its passes have found out about them, and the objective's view of that."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import fields, replace
from typing import Any

import numpy as np
import torch

from rltk.algorithms import Objective, TokenBatch
from rltk.algorithms.objective import Reduce
from rltk.learner.needs import Needs
from rltk.learner.packing import Packed, RaggedBatch, pack
from rltk.learner.scored import advantages, sequence_columns
from rltk.learner.tables import Tables


class Step:
    """`kept`: numbers of the sequences to learn from; `tables`: what is known of each, filled in pass by pass."""

    def __init__(
        self, batch: RaggedBatch, objective: Objective, needs: Needs, model: Any, device: torch.device
    ) -> None:
        """model: the Hugging Face model, for the sizes of its vocabulary and hidden states and for its dtype."""
        self.batch, self.objective, self.needs, self.device = batch, objective, needs, device
        self.tables = Tables(len(batch.reward))
        self.advantage, self.kept = advantages(objective, batch)
        self.of_groups = {name: column for name, column in sequence_columns(batch).items() if name in needs.of_groups}
        config = model.config.get_text_config()
        self.log_vocabulary = math.log(config.vocab_size)
        self.no_hidden = torch.zeros(0, config.hidden_size, dtype=model.dtype)

    def prepare(self, sequences: Sequence[int], reduce: Reduce, first: bool) -> TokenBatch:
        """What the objective makes of `sequences`, this rank's part of a minibatch, before the loss pass.

        Of its hidden states only `[B, T, 0]` goes on to the micro-batches. Of entropy nothing does, as the loss pass
        has the current one, unless the objective put another in its place.
        """
        known = self._shard(sequences)
        shard = self.objective.prepare(known, reduce, first)
        self.tables.drop("hidden", sequences)
        hidden = None if known.hidden is None else known.hidden.new_zeros(*known.mask.shape, 0)
        return replace(shard, hidden=hidden, entropy=None if shard.entropy is known.entropy else shard.entropy)

    def micro_batch(
        self, shard: TokenBatch, row: int, sequences: Sequence[int], packed: Packed, found: dict[str, torch.Tensor]
    ) -> TokenBatch:
        """`sequences`, which begin at `row` of the prepared shard, with what the loss pass has `found` of them."""
        rows = slice(row, row + len(sequences))
        tokens: dict[str, Any] = {}
        for field in fields(TokenBatch):
            value = getattr(shard, field.name)
            if value is not None:  # the shard's tables are as wide as its longest sequence
                tokens[field.name] = value[rows, : packed.columns] if value.ndim > 1 else value[rows]
        tokens["new"] = packed.table(found["logprobs"])
        if self.tables.flat("old", sequences) is None:
            tokens["old"] = tokens["new"].detach()
        for name in self.needs.in_loss:
            tokens.setdefault(name, packed.table(self._unit(name, found[name])))
        return TokenBatch(**tokens)

    def note(self, sequences: Sequence[int], found: dict[str, torch.Tensor], first: bool) -> None:
        """Keep what the loss pass found. On the first minibatch it is of before the step: `old`, if no pass came."""
        values = {"new": found["logprobs"], "entropy": found["entropy"]}
        if first and self.tables.flat("old", sequences) is None:
            values["old"] = found["logprobs"]
        self.tables.put(self.batch.masked_lengths, sequences, **values)

    def _shard(self, sequences: Sequence[int]) -> TokenBatch:
        """What is known before the loss pass; `new` is `old`.

        Where no pass came before (reference=mu after the first minibatch, old=detach) mu stands for `old`, which no
        objective reads there. A rank without sequences takes part in the sums of `prepare` too, with no rows.
        """
        packed = pack_sequences(self.batch, sequences, self.device)

        def table(values: torch.Tensor) -> torch.Tensor:
            if not sequences:
                return values.new_zeros(0, 1, *values.shape[1:], device=self.device)
            return packed.table(values.to(self.device))

        places = [self.batch.sequence(s) for s in sequences]
        mu = [self.batch.mu[place][self.batch.mask[place]] for place in places]
        tokens = {"mu": table(torch.from_numpy(np.concatenate([np.zeros(0, np.float32), *mu])))}
        for name in ("old", *self.needs.before, *(["ref"] if self.needs.ref_before else [])):
            values = self.tables.flat(name, sequences)
            if values is None and not sequences:
                values = self.no_hidden if name == "hidden" else torch.zeros(0)
            if values is not None:
                tokens[name] = table(self._unit(name, values))
        tokens.setdefault("old", tokens["mu"])
        mask = table(torch.ones(sum(map(len, mu)), dtype=torch.bool))
        columns = {"advantage": self.advantage, "group": torch.from_numpy(self.batch.group), **self.of_groups}
        rows = torch.tensor(list(sequences), dtype=torch.long)
        of_rows: dict[str, Any] = {name: column[rows].to(self.device) for name, column in columns.items()}
        return TokenBatch(new=tokens["old"], mask=mask, **tokens, **of_rows)

    def _unit(self, name: str, values: torch.Tensor) -> torch.Tensor:
        """An objective's entropy is in units of log V; ours in nats."""
        return values / self.log_vocabulary if name == "entropy" else values


def pack_sequences(batch: RaggedBatch, sequences: Sequence[int], device: torch.device) -> Packed:
    """An empty micro-batch runs two tokens of the first sequence, so that every rank makes the same calls."""
    rows = [(batch.ids[batch.sequence(s)], batch.mask[batch.sequence(s)]) for s in sequences]
    return pack(rows or [(batch.ids[:2], np.asarray([False, True]))]).to(device)


def accumulate(sums: dict[str, Any], found: dict[str, Any]) -> None:
    """Add up the shares of an optimizer step's figures; `_max` ones take the largest."""
    for name, value in found.items():
        if name not in sums:
            sums[name] = value
        else:
            sums[name] = max(sums[name], value) if name.endswith("_max") else sums[name] + value


def mean_of_steps(steps: Sequence[dict[str, float]]) -> dict[str, float]:
    """A training step's metrics from those of its optimizer steps; `_max` ones take the largest."""
    metrics: dict[str, float] = {"optimizer_steps": float(len(steps))}
    for name in {name for step in steps for name in step}:
        values = [step[name] for step in steps if name in step]
        metrics[name] = max(values) if name.endswith("_max") else float(np.mean(values))
    return metrics
