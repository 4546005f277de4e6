"""An objective that needs every field the learner can supply, and writes down what it was given."""

import os
from dataclasses import replace
from pathlib import Path

import torch

from rltk.algorithms import Objective, TokenBatch, option

FIELDS = ("ref", "entropy", "hellinger", "forward_kl", "reward", "pass_rate", "group_length", "hidden")


class Everything(Objective):
    """A loss in which every field has a part. `record`: the folder that its batches are written to."""

    record: str = option("")

    @property
    def needs(self):
        return frozenset(FIELDS)

    def prepare(self, shard, reduce=None, first=True):
        shard = super().prepare(shard, reduce, first)
        self._write("prepare", shard)
        sums = torch.stack([(shard.hidden.abs() * shard.mask[..., None]).sum(), shard.mask.sum()])
        size, tokens = sums if reduce is None else reduce(sums)
        return replace(shard, advantage=shard.advantage * (1 + size / tokens / shard.hidden.shape[-1]))

    def token_loss(self, batch):
        self._write("loss", batch)
        weight = 1 + batch.hellinger + batch.forward_kl + batch.entropy
        weight = weight + (batch.pass_rate + batch.reward + 1 / batch.group_length)[:, None]
        gain = weight * self.ratio(batch) * self.token_advantage(batch)
        return 0.1 * (batch.new - batch.ref) ** 2 - gain, {"weight": weight}

    def _write(self, where: str, batch: TokenBatch) -> None:
        folder = Path(self.record)
        number = len(list(folder.glob(f"{where}-{os.getpid()}-*")))
        found = {name: value.detach() for name, value in vars(batch).items() if value is not None}
        torch.save(found, folder / f"{where}-{os.getpid()}-{number}.pt")


def recorded(folder: Path, where: str) -> dict[float, dict[str, torch.Tensor]]:
    """{the first sampled token's mu, which no two sequences share: {field: value, per token [n, ...] or a scalar}}."""
    sequences = {}
    for path in sorted(folder.glob(f"{where}-*")):
        batch = torch.load(path)
        for row, mask in enumerate(batch["mask"]):
            per_token = {n: v[row][mask] if v.ndim > 1 else v[row] for n, v in batch.items()}
            sequences[per_token["mu"][0].item()] = per_token
    return sequences
