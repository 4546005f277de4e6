"""Death times: which query was the first that no longer saw a token, by layer and KV head.

A policy is exactly its death times: a model that attends with the mask `key <= query < death[layer, head, key]`
computes the log-probs that the engine sampled with, so a learner can replay an eviction instead of correcting for it.
Positions are those of the real sequence (dapq's pseudo tokens have none). A token cut at prefill dies at the prompt's
length.

Every decode step leaves one row of overwritten positions a request on the device; the worker copies it behind the step
and files it, on request, by whose first block it was.
"""

from __future__ import annotations

import logging
from collections import OrderedDict
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from rltk.errors import MismatchError, RltkError
from rltk.rollout.kv import versions
from rltk.rollout.kv.settings import Settings

if TYPE_CHECKING:
    from rltk.rollout.kv.memory import Owner

log = logging.getLogger("rltk.kv")

NEVER = np.iinfo(np.int32).max
UNREAD_STEPS = 256  # steps whose copies may wait on the host
FINISHED = 8192  # finished requests whose death times nobody has taken yet


@dataclass
class Deaths:
    """One request's. kept: int [layers, heads, kept] of a cut prompt; evicted: query position, int [layers, heads]."""

    prompt: int
    pseudo: int
    kept: np.ndarray | None = None
    evicted: list[tuple[int, np.ndarray]] = field(default_factory=list)

    def times(self, length: int, layers: int, heads: int) -> np.ndarray:
        """int32 [layers, heads, length]."""
        died = np.full((layers, heads, length), NEVER, np.int32)
        if self.kept is not None:
            died[:, :, : self.prompt] = self.prompt
            np.put_along_axis(died, self.kept, NEVER, 2)
        if self.evicted:
            queries = np.array([query for query, _ in self.evicted], np.int32)
            victims = np.stack([row for _, row in self.evicted])  # [steps, layers, heads]
            victims[queries >= length - 1] = -1  # a step that vLLM ran ahead: nobody reads what the last token saw
            step, layer, head = (victims >= 0).nonzero()
            died[layer, head, victims[step, layer, head]] = queries[step]
        return died


class Recorder:
    """evicted: int32 [layers, rows, Hkv] on the device, written by every decode step."""

    evicted: torch.Tensor

    def __init__(self, settings: Settings, layers: int) -> None:
        self.shared, self.layers = settings.options.heads == "shared", layers
        self.requests: dict[str, Deaths] = {}
        self.finished: OrderedDict[str, None] = OrderedDict()
        self._unread: list[tuple[Any, ...]] = []

    def collect(self, step: Any, owners: dict[int, Owner]) -> None:
        """Behind a step, on its stream: the next one overwrites what this copies."""
        if step.prefill is not None:
            self._file_prompts(step.prefill, owners)
        if step.decode is not None:
            rows = step.decode.rows
            heads = 1 if self.shared else self.evicted.shape[2]
            copies = [_to_host(t) for t in (
                self.evicted[:, :rows, :heads], step.decode.block_table[:, 0], step.decode.seq_lens
            )]  # fmt: skip
            event = None
            if self.evicted.is_cuda:
                event = torch.cuda.Event()
                event.record()
            self._unread.append((event, owners, *copies))
            if len(self._unread) >= UNREAD_STEPS:
                self._read()

    def _file_prompts(self, prefill: Any, owners: dict[int, Owner]) -> None:
        layers = sorted(prefill.kept, key=_number)
        for number, group in enumerate(prefill.groups):
            kept = None
            if group.cut and layers:
                kept = torch.stack([prefill.kept[layer][number] for layer in layers], 1).cpu().numpy()
            for at, prompt in enumerate(group.prompts):
                if prompt.first in owners:
                    deaths = Deaths(prompt.length, prompt.pseudo, None if kept is None else kept[at])
                    self.requests[owners[prompt.first].request_id] = deaths

    def _read(self) -> None:
        for event, owners, evicted, firsts, lengths in self._unread:
            if event is not None:
                event.synchronize()
            victims = evicted.numpy()
            for row, (first, length) in enumerate(zip(firsts.tolist(), lengths.tolist(), strict=True)):
                owner = owners.get(first)
                if not length or owner is None:
                    continue  # a padded row
                deaths = self.requests.setdefault(owner.request_id, Deaths(owner.prompt, owner.pseudo))
                if (victims[:, row] >= 0).any():
                    deaths.evicted.append((length - 1 - owner.pseudo, victims[:, row].copy()))
        self._unread.clear()

    def take(self, lengths: dict[str, int]) -> dict[str, np.ndarray]:
        """By external id, for those asked for; they are forgotten."""
        self._read()
        found: dict[str, np.ndarray] = {}
        heads = 1 if self.shared else self.evicted.shape[2]
        for internal in reversed(list(self.requests)):  # an id may have been used before, and not have been taken
            name = next((n for n in (internal, versions.external_id(internal)) if n in lengths), None)
            if name is not None:
                deaths = self.requests.pop(internal)
                if name not in found:
                    found[name] = deaths.times(lengths[name], self.layers, heads)
        return found

    def forget(self, finished: set[str]) -> None:
        """What ended and nobody takes is kept for a while, not for ever."""
        self.finished.update(dict.fromkeys(finished))
        while len(self.finished) > FINISHED:
            self._read()
            request_id, _ = self.finished.popitem(last=False)
            if self.requests.pop(request_id, None) is not None:
                log.warning("death times of request %s were never taken: dropped", request_id)


def _to_host(tensor: torch.Tensor) -> torch.Tensor:
    if not tensor.is_cuda:
        return tensor.clone()
    host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
    return host.copy_(tensor, non_blocking=True)


def _number(layer: str) -> int:
    from rltk.rollout.kv.memory import layer_number

    return layer_number(layer)


def worker_deaths(worker: Any, lengths: dict[str, int]) -> dict[str, tuple[list[int], bytes]]:
    """Worker.rltk_kv_deaths: shape and bytes, which reach another process as they are."""
    from rltk.rollout.kv.memory import memory_of

    recorder = memory_of(worker).recorder
    if recorder is None:
        raise RltkError("this engine keeps no death times. Fix: KVOptions(record=True).")
    return {name: (list(died.shape), died.tobytes()) for name, died in recorder.take(lengths).items()}


def take_death_times(engine: Any, lengths: dict[str, int]) -> dict[str, np.ndarray]:
    """Death times of requests that ran, by the id they were added under, each taken once.

    lengths: total length (prompt and response) of each. Returns int32 [layers, heads, length]; heads is 1 for
    heads=shared, else the model's KV heads. Int32's greatest: never. Raises MismatchError for an unknown id.
    """
    workers = versions.engine_of(engine).collective_rpc("rltk_kv_deaths", args=(lengths,))
    missing = sorted(set(lengths) - set(workers[0]))
    if missing:
        raise MismatchError(f"no death times of requests {', '.join(missing)}: never ran here, or taken before")
    found = {}
    for name in lengths:
        ranks = [np.frombuffer(worker[name][1], np.int32).reshape(worker[name][0]) for worker in workers]
        found[name] = np.concatenate(ranks, 1)
    return found
