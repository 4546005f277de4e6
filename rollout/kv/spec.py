"""The block pool's side: how many blocks a sequence may hold, and who may start.

A request is admitted only when the pool can hold it *and* every running request at their caps. So none ever waits for a
block in the middle, none is preempted (a preempted sequence would be prefilled again and change its policy), and the
number that run at once is usable blocks // blocks of a cap, however many vLLM is told to run.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass, fields
from functools import cached_property
from typing import Any

from vllm.v1.core.single_type_kv_cache_manager import FullAttentionManager
from vllm.v1.kv_cache_interface import FullAttentionSpec
from vllm.v1.kv_cache_spec_registry import KVCacheSpecRegistry

from rltk.errors import RltkError
from rltk.rollout.kv.settings import Settings


@dataclass(frozen=True, kw_only=True)
class CompressedSpec(FullAttentionSpec):
    """One layer's cache. compression: Settings as JSON, for specs are hashed, compared and sent to other processes."""

    compression: str = ""

    @classmethod
    def of(cls, spec: FullAttentionSpec, settings: Settings) -> CompressedSpec:
        stock = {f.name: getattr(spec, f.name) for f in fields(spec) if f.init}
        return cls(**stock, compression=settings.to_json())

    @property
    def prefix_cacheable(self) -> bool:
        return False

    @property
    def uses_slot_mapping(self) -> bool:
        return False  # slots are the backend's own; past the cap vLLM's mapping points at other requests' blocks

    @property
    def settings(self) -> Settings:
        return Settings.from_json(self.compression)

    def blocks(self, slots: int) -> int:
        return -(-slots // self.block_size)

    def max_memory_usage_bytes(self, vllm_config: Any) -> int:
        """vLLM refuses to start below this: one request of the greatest length, and its null block."""
        return (self.blocks(self.settings.most_slots) + 1) * self.page_size_bytes

    @classmethod
    def merge(cls, specs: list[CompressedSpec]) -> CompressedSpec:
        if any(spec != specs[0] for spec in specs[1:]):
            raise RltkError(f"a compressed cache needs one shape in every layer, not {sorted(map(str, set(specs)))}")
        return copy.deepcopy(specs[0])


@dataclass(frozen=True)
class Plan:
    """A request's slots. dropped: tokens of its engine sequence that never get one. blocks: at its cap."""

    dropped: int
    slots: int
    blocks: int


class CompressedManager(FullAttentionManager):
    """Blocks of a request: of its slots, not of its tokens. Never freed early."""

    def __init__(self, kv_cache_spec: CompressedSpec, *args: Any, **kwargs: Any) -> None:
        super().__init__(kv_cache_spec, *args, **kwargs)
        if self.enable_caching:
            raise RltkError("prefix caching is on in an engine with a compressed KV cache")
        self.plans: dict[str, Plan] = {}
        self.usable = self.block_pool.num_gpu_blocks - 1  # vLLM keeps a null block
        self.most_blocks = 0  # held at once, ever

    @cached_property
    def settings(self) -> Settings:
        return self.kv_cache_spec.settings

    def expect(self, request_id: str, prompt: int, pseudo: int, max_tokens: int) -> None:
        """A request's real prompt, its pseudo tokens and what it may sample, before it is first scheduled."""
        slots = self.settings.slots(prompt, max_tokens)
        dropped = prompt + pseudo - self.settings.kept(prompt)
        self.plans[request_id] = Plan(dropped, slots, self.kv_cache_spec.blocks(slots))

    def get_num_blocks_to_allocate(self, request_id: str, num_tokens: int, *args: Any, **kwargs: Any) -> int:
        """For a running request what it needs now, for a new one what it and all others can still come to need."""
        plan, held = self._plan(request_id), self.req_to_blocks.get(request_id)
        if held:
            return max(0, self._blocks_now(plan, num_tokens) - len(held))
        promised = sum(self._plan(other).blocks - len(blocks) for other, blocks in self.req_to_blocks.items() if blocks)
        return plan.blocks + promised

    def allocate_new_blocks(self, request_id: str, num_tokens: int, *args: Any, **kwargs: Any) -> list[Any]:
        blocks = self._blocks_now(self._plan(request_id), num_tokens)
        new = super().allocate_new_blocks(request_id, blocks * self.block_size, *args, **kwargs)
        self.most_blocks = max(self.most_blocks, self.usable - self.block_pool.get_num_free_blocks())
        return new

    def _plan(self, request_id: str) -> Plan:
        plan = self.plans.get(request_id)
        if plan is None:
            raise RltkError(
                f"request {request_id} lost its blocks while it ran (preempted, or paused with clear_cache=True): with "
                "a compressed cache it would go on as another policy. Fix: pause with clear_cache=False, or abort."
            )
        return plan

    def _blocks_now(self, plan: Plan, num_tokens: int) -> int:
        return self.kv_cache_spec.blocks(min(num_tokens - plan.dropped, plan.slots))

    def pop_blocks_for_free(self, request_id: str) -> list[Any]:
        self.plans.pop(request_id, None)
        return super().pop_blocks_for_free(request_id)

    def cache_blocks(self, *args: Any, **kwargs: Any) -> None:
        """Nothing is shared: a block's content is its request's alone."""

    def get_num_common_prefix_blocks(self, running_request_id: str) -> int:
        return 0


# The built-in specs first, or the registry would think that they are there. On import, so that a process that only
# unpickles a spec has its manager.
KVCacheSpecRegistry._ensure_registered()
KVCacheSpecRegistry.register(CompressedSpec, CompressedManager, uniform_type_base_spec=CompressedSpec)
