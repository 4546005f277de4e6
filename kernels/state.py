"""What a decode step knows beside the pages: the settings of a compressed cache, and its state in one layer.

A request's state is keyed by its first physical block (`block_table[r, 0]`), so it survives reordering of the batch and
sits in static tensors, as CUDA graphs need. Whoever prefills a request sets it anew: the block's previous owner left
its own.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch

Mode = Literal["append", "longflow", "h2o", "ring"]

NO_CAP = 1 << 30  # append: a request may hold as many slots as it has blocks


@dataclass(frozen=True)
class DecodeSettings:
    """How decoding treats a cache. Raises ValueError where no slot could ever be given up.

    mode: append (never evicts), longflow (least attention x ||v||_1 of the step before), h2o (least attention so far),
        ring (the oldest slot after the sinks).
    scale: softmax scale.
    cap: slots that a request may hold.
    sinks: first slots that are never given up.
    recent: h2o: the newest tokens, by position, that are never given up (1 or more: else the new token goes at once).
    pseudo: tokens of the engine's sequence that stand at no position (dapq's): position = seq_len - 1 - pseudo.
    """

    mode: Mode
    scale: float
    cap: int = NO_CAP
    sinks: int = 0
    recent: int = 0
    pseudo: int = 0

    def __post_init__(self) -> None:
        if self.mode not in ("append", "longflow", "h2o", "ring"):
            raise ValueError(f"mode is {self.mode!r}; use append, longflow, h2o or ring")
        if self.mode == "h2o" and self.recent < 1:
            raise ValueError(f"h2o needs recent >= 1, not {self.recent}: the newest token has the least attention")
        protected = self.sinks + (self.recent if self.mode == "h2o" else 0)
        if self.mode != "append" and self.cap <= protected:
            raise ValueError(f"cap {self.cap} leaves no slot to give up: {protected} are protected; raise the budget")


@dataclass
class DecodeState:
    """One layer's state. NB blocks of N slots, Hkv KV heads; Hv = 1 (heads shared) or Hkv (per_kv_head).

    dropped [NB] int32: tokens of the engine's sequence that never got a slot (prompt - kept, and dapq's pseudo tokens).
    evict [NB, Hv] int32: slot that the next token overwrites once n = cap (longflow, h2o); decoding writes it.
    acc [NB, Hkv, N] fp32 (h2o): attention that each slot has received; whoever prefills writes the kept tokens'.
    slot_pos [NB, Hkv, N] int32 (h2o, recording): position of each slot's token; whoever prefills writes the kept ones.
    evicted [rows, Hkv] int32 (recording): position of the token overwritten in this step by batch row, -1: none.
    """

    dropped: torch.Tensor
    evict: torch.Tensor
    acc: torch.Tensor | None = None
    slot_pos: torch.Tensor | None = None
    evicted: torch.Tensor | None = None

    @classmethod
    def allocate(
        cls, settings: DecodeSettings, num_blocks: int, kv_heads: int, block_size: int, *,
        heads: str = "shared", record_rows: int = 0, device: torch.device | str = "cpu",
    ) -> DecodeState:  # fmt: skip
        """Zeroed state for `num_blocks`; `record_rows` > 0 records evictions for batches of up to that many rows."""
        slots = (num_blocks, kv_heads, block_size)
        positions = settings.mode == "h2o" or record_rows > 0

        def zeros(*shape: int, dtype: torch.dtype = torch.int32) -> torch.Tensor:
            return torch.zeros(*shape, dtype=dtype, device=device)

        return cls(
            dropped=zeros(num_blocks),
            evict=zeros(num_blocks, 1 if heads == "shared" else kv_heads),
            acc=zeros(*slots, dtype=torch.float32) if settings.mode == "h2o" else None,
            slot_pos=zeros(*slots) if positions else None,
            evicted=zeros(record_rows, kv_heads) - 1 if record_rows else None,
        )
