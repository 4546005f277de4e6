"""How much of a sequence's keys and values an engine keeps, and which. A leaf: no torch, no vLLM."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

STOCK = ("full", "fp8")  # vLLM's own caches
HEADS = ("shared", "per_kv_head")


@dataclass(frozen=True)
class KVOptions:
    """`kv=<name>` with its options; conf/kv/<name>.yaml lists them.

    budget: slots a sequence keeps, in tokens (1 or more) or as a share (under 1): of the request's prompt for dapq and
    snapkv, of the engine's longest sequence for longflow, h2o and streaming. full and fp8 take none.
    """

    name: str = "full"
    budget: float = 0.0
    heads: str = "shared"  # one victim for all KV heads (the paper's) | per_kv_head
    sinks: int = 4  # first slots that are never given up
    record: bool = False  # keep the death time of every token (rollout/kv/recorder.py)
    options: dict[str, Any] = field(default_factory=dict)  # the policy's own: its constructor's arguments

    @property
    def compressed(self) -> bool:
        return self.name not in STOCK

    def slots(self, length: int) -> int:
        """The budget in tokens, a share being of `length`."""
        return int(self.budget) if self.budget >= 1 else max(1, math.floor(self.budget * length))


def policies() -> list[str]:
    """Names that `kv` may take: vLLM's own caches, and the modules of rollout/kv/policies by file name."""
    folder = Path(__file__).parent / "policies"
    return [*STOCK, *sorted(file.stem for file in folder.glob("*.py") if file.stem not in ("__init__", "policy"))]
