"""The attention backend: which rows decode, which are prompts, and what each layer does with them.

Decode rows go through one kernel over the request's slots (kernels/decode.py; its torch reference on a CPU), the whole
of it inside CUDA graphs. Prompts are computed whole: full causal attention among their own keys, then every layer keeps
what the policy chooses (prefill.py). vLLM's slot mapping is never read.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor
from vllm.v1.attention.backend import (
    AttentionBackend,
    AttentionCGSupport,
    AttentionImpl,
    AttentionMetadata,
    AttentionMetadataBuilder,
    MultipleOf,
)

from rltk.errors import ConfigError, RltkError
from rltk.rollout.kv import versions
from rltk.rollout.kv.memory import Memory
from rltk.rollout.kv.prefill import Prefill, prefill, rewrite_positions


class CompressedBackend(AttentionBackend):
    forward_includes_kv_cache_update = True
    supported_dtypes: ClassVar = [torch.float32, torch.bfloat16, torch.float16]

    @staticmethod
    def get_name() -> str:
        return "CUSTOM"  # the enum member that it is registered as

    @staticmethod
    def get_supported_kernel_block_sizes(kv_cache_spec: Any = None) -> list[Any]:
        return [MultipleOf(16)]

    @staticmethod
    def get_impl_cls() -> type[CompressedAttention]:
        return CompressedAttention

    @staticmethod
    def get_builder_cls() -> type[CompressedBuilder]:
        return CompressedBuilder

    # One page [NB, Hkv, N, 2D], contiguous per (block, head). 0.26 asks for a shape, later versions for a layout.
    @staticmethod
    def get_kv_cache_shape(
        num_blocks: int, block_size: int, num_kv_heads: int, head_size: int, cache_dtype_str: str = "auto"
    ) -> tuple[int, ...]:
        return num_blocks, num_kv_heads, block_size, 2 * head_size

    @staticmethod
    def get_kv_cache_stride_order(include_num_layers_dimension: bool = False) -> tuple[int, ...]:
        return (0, 1, 2, 3, 4) if include_num_layers_dimension else (0, 1, 2, 3)

    @classmethod
    def supported_kv_cache_layouts(cls) -> Any:
        return versions.page_layouts()


@dataclass
class Decode:
    """One token a row. tokens: None if row r's token is token r, else int64 [R]; block_table [R, MB]; seq_lens [R]."""

    rows: int
    tokens: Tensor | None
    block_table: Tensor
    seq_lens: Tensor


@dataclass
class CompressedMetadata(AttentionMetadata):
    memory: Memory
    decode: Decode | None
    prefill: Prefill | None


class CompressedBuilder(AttentionMetadataBuilder[CompressedMetadata]):
    """Runs before every forward, outside CUDA graphs: a replayed graph reads the tensors that it fills."""

    _cudagraph_support: ClassVar = AttentionCGSupport.UNIFORM_SINGLE_TOKEN_DECODE

    def __init__(self, kv_cache_spec: Any, layer_names: list[str], vllm_config: Any, device: torch.device) -> None:
        super().__init__(kv_cache_spec, layer_names, vllm_config, device)
        self._init_reorder_batch_threshold(1, supports_spec_as_decode=False)
        self.memory = Memory(kv_cache_spec, layer_names, vllm_config, device)

    def build(self, common_prefix_len: int, common_attn_metadata: Any, fast_build: bool = False) -> CompressedMetadata:
        common, memory = common_attn_metadata, self.memory
        starts = common.query_start_loc_cpu[: common.num_reqs + 1]
        lengths = common.seq_lens_cpu_upper_bound  # exact: nothing is speculated here
        lengths = (common.seq_lens.cpu() if lengths is None else lengths)[: common.num_reqs]
        table = common.block_table_tensor[: common.num_reqs]
        queries = starts[1:] - starts[:-1]
        if common.max_query_len <= 1:
            decode = Decode(common.num_reqs, None, table, common.seq_lens[: common.num_reqs])
            step = CompressedMetadata(memory, decode, None)
            single = (lengths == 1).nonzero().squeeze(1)
        else:
            prompts = (queries > 1).nonzero().squeeze(1)
            decoding = (queries == 1).nonzero().squeeze(1)
            single = decoding[lengths[decoding] == 1]
            decode = self._some_rows(decoding, starts, common) if len(decoding) else None
            step = CompressedMetadata(memory, decode, self._prompts(prompts, starts, lengths, table))
        if len(single):  # prompts of one token: nothing of theirs was dropped, whatever the block's last owner left
            memory.dropped[table[single.to(table.device), 0].long()] = 0
        if memory.settings.pseudo:
            rewrite_positions(common.positions, memory.settings.pseudo, step)
        memory.step = step
        return step

    def _some_rows(self, rows: Tensor, starts: Tensor, common: Any) -> Decode:
        """Decode rows of a batch that also holds prompts: never in a graph, so picking them out is fine."""
        device = common.seq_lens.device
        at = rows.to(device)
        return Decode(len(rows), starts[rows].long().to(device), common.block_table_tensor[at], common.seq_lens[at])

    def _prompts(self, rows: Tensor, starts: Tensor, lengths: Tensor, table: Tensor) -> Prefill:
        memory, tables = self.memory, table[rows.to(table.device)]
        firsts = tables[:, 0].tolist()  # waits for the device; only where a prompt is computed
        prompts = []
        for number, row in enumerate(rows.tolist()):
            start, stop = int(starts[row]), int(starts[row + 1])
            if int(lengths[row]) != stop - start and firsts[number]:  # block 0 is nobody's: a warm-up
                raise RltkError(
                    f"a part of a prompt arrived: {stop - start} of {int(lengths[row])} tokens. A compressed cache "
                    "needs whole prompts (no chunked prefill, no prefix caching)."
                )
            owner = memory.owners.get(firsts[number]) if firsts[number] else None
            prompts.append((start, stop - start, owner.pseudo if owner else 0))
        return Prefill.plan(prompts, firsts, tables, memory)


class CompressedAttention(AttentionImpl):
    def __init__(
        self, num_heads: int, head_size: int, scale: float, num_kv_heads: int | None = None, alibi_slopes: Any = None,
        sliding_window: int | None = None, kv_cache_dtype: str = "auto", logits_soft_cap: float | None = None,
        attn_type: str = "decoder", kv_sharing_target_layer_name: str | None = None, **others: Any,
    ) -> None:  # fmt: skip
        unknown = dict(
            alibi_slopes=alibi_slopes, sliding_window=sliding_window, logits_soft_cap=logits_soft_cap,
            kv_sharing_target_layer_name=kv_sharing_target_layer_name, **others,
        )  # fmt: skip
        unknown = [name for name, value in unknown.items() if isinstance(value, Tensor) or value]
        if unknown or str(getattr(attn_type, "value", attn_type)) != "decoder":
            raise ConfigError(f"a compressed KV cache knows plain causal attention only, not {unknown or attn_type}")
        if versions.on_gpu() and (head_size < 16 or head_size & (head_size - 1)):
            raise ConfigError(f"the kernels of compressed KV caches take head sizes 16, 32, 64, ..., not {head_size}")
        self.num_heads, self.head_size, self.scale = num_heads, head_size, float(scale)
        self.num_kv_heads, self.kv_cache_dtype = num_kv_heads or num_heads, kv_cache_dtype
        self._decode, self._settings = versions.kernel("decode", versions.on_gpu()), None

    def forward(
        self, layer: Any, query: Tensor, key: Tensor, value: Tensor, kv_cache: Tensor,
        attn_metadata: CompressedMetadata | None, output: Tensor, output_scale: Any = None,
        output_block_scale: Any = None,
    ) -> Tensor:  # fmt: skip
        """query, output [T, Hq, D]; key, value [T, Hkv, D]; kv_cache [NB, Hkv, N, 2D]. T may be padded."""
        if attn_metadata is None:  # memory profiling
            return output.zero_()
        step, memory = attn_metadata, attn_metadata.memory
        if kv_cache.shape[0] != memory.blocks:
            raise RltkError(f"the cache has {kv_cache.shape[0]} blocks, its state was made for {memory.blocks}")
        if self._settings is None:
            self._settings = memory.decode_settings(self.scale)
        state = memory.states[layer.layer_name]
        if step.decode is not None:
            rows = step.decode
            if rows.tokens is None:
                q, k, v, out = (tensor[: rows.rows] for tensor in (query, key, value, output))
            else:
                q, k, v = (tensor[rows.tokens] for tensor in (query, key, value))
                out = torch.empty_like(q)
            self._decode(q, k, v, kv_cache, rows.block_table, rows.seq_lens, state, self._settings, out)
            if rows.tokens is not None:
                output[rows.tokens] = out
        if step.prefill is not None:
            kept = prefill(query, key, value, kv_cache, state, step.prefill, memory.settings, self.scale, output)
            step.prefill.kept[layer.layer_name] = kept
        return output
