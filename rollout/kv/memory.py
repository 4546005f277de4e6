"""What one worker knows about its compressed cache: every layer's state, and whose blocks are whose.

One Memory a worker, made with the backend's metadata builder when the cache's size is known and before any CUDA graph
is captured: the states are static tensors from then on. They come on top of the memory that vLLM gave its blocks: four
bytes a slot and head for recorded positions, and eight for h2o, beside the 512 of a bf16 slot of head size 128.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from rltk.errors import RltkError
from rltk.kernels.state import DecodeSettings, DecodeState
from rltk.rollout.kv.pseudo import is_wrapped, pseudo_ids
from rltk.rollout.kv.recorder import Recorder
from rltk.rollout.kv.settings import Settings
from rltk.rollout.kv.spec import CompressedSpec


@dataclass(frozen=True)
class Owner:
    """Whose block it is. prompt: real tokens; pseudo: how many were put in (0 for a probe's prompt)."""

    request_id: str
    prompt: int
    pseudo: int


class Memory:
    """states: by layer. dropped [NB] int32: one tensor that all layers share. owners: by a request's first block."""

    def __init__(self, spec: CompressedSpec, layers: list[str], vllm_config: Any, device: torch.device) -> None:
        blocks = vllm_config.cache_config.num_gpu_blocks
        if not blocks:
            raise RltkError("the compressed cache was built before its number of blocks was known")
        self.settings: Settings = spec.settings
        self.blocks, self.block_size = blocks, spec.block_size
        self.layers = sorted(layers, key=layer_number)
        self.pseudo_ids = pseudo_ids(self.settings.pseudo, vllm_config.model_config.get_vocab_size())
        self.owners: dict[int, Owner] = {}
        rows = batch_rows(vllm_config) if self.settings.options.record else 0
        settings = self.decode_settings(1.0)
        self.states: dict[str, DecodeState] = {}
        for layer in self.layers:
            self.states[layer] = DecodeState.allocate(
                settings, blocks, spec.num_kv_heads, spec.block_size,
                heads=self.settings.options.heads, record_rows=rows, device=device,
            )  # fmt: skip
        self.dropped = self.states[self.layers[0]].dropped
        self.recorder = Recorder(self.settings, len(self.layers)) if rows else None
        if rows:  # one tensor, so that a step's evictions leave the device in one copy
            evicted = torch.full((len(layers), rows, spec.num_kv_heads), -1, dtype=torch.int32, device=device)
            for number, layer in enumerate(self.layers):
                self.states[layer].evicted = evicted[number]
            self.recorder.evicted = evicted
        for state in self.states.values():
            state.dropped = self.dropped
        self.step: Any = None  # the metadata of the step under way

    def decode_settings(self, scale: float) -> DecodeSettings:
        """The kernel's view of the policy."""
        settings, policy = self.settings, self.settings.policy
        sinks = settings.options.sinks
        recent = policy.window(settings.cap, sinks) if policy.mode == "h2o" else 0
        return DecodeSettings(policy.mode, scale, settings.cap, sinks, recent, settings.pseudo)

    def before_step(self, scheduler_output: Any) -> None:
        """Note the owners of the blocks that this step's new requests bring."""
        self.step = None
        new = scheduler_output.scheduled_new_reqs
        if new:
            owners = dict(self.owners) if self.recorder else self.owners  # the recorder's unread steps keep theirs
            for request in new:
                prompt = request.prompt_token_ids or []
                pseudo = self.settings.pseudo if self.pseudo_ids and is_wrapped(prompt, self.pseudo_ids) else 0
                owners[request.block_ids[0][0]] = Owner(request.req_id, len(prompt) - pseudo, pseudo)
            self.owners = owners
        if self.recorder is not None:
            self.recorder.forget(scheduler_output.finished_req_ids)

    def after_step(self) -> None:
        if self.recorder is not None and self.step is not None:
            self.recorder.collect(self.step, self.owners)


def layer_number(name: str) -> int:
    """Of `model.layers.7.self_attn.attn`."""
    return next(int(part) for part in name.split(".") if part.isdigit())


def batch_rows(vllm_config: Any) -> int:
    """The most rows of a batch, a CUDA graph's padding included."""
    graphs = vllm_config.compilation_config.cudagraph_capture_sizes or []
    return max([vllm_config.scheduler_config.max_num_seqs, *graphs])


def memory_of(worker: Any) -> Memory:
    """A worker's. Raises RltkError where its attention is not ours."""
    from rltk.rollout.kv.backend import CompressedBuilder

    groups = [group for groups in worker.model_runner.attn_groups for group in groups]
    builders = [group.get_metadata_builder(0) for group in groups]
    if len(builders) != 1 or not isinstance(builders[0], CompressedBuilder):
        raise RltkError(f"a compressed cache needs one attention backend, its own; this worker has {builders}")
    return builders[0].memory
