"""The sampler's KV cache: full, quantised, or with a fixed number of slots whose tokens give way to new ones.

A compressed cache follows the engine's rules (kernels/decode_reference.py; a test holds the two together). A sequence
of n tokens holds min(n, cap) slots; what does not fit is overwritten, for each layer and KV head (or all heads alike):

    longflow    the slot of smallest sum_heads alpha * ||v||_1 at the step before (arXiv 2603.11504)
    h2o         the slot of least attention so far, outside of the recent window (arXiv 2306.14048)
    streaming   the oldest but for the first `sinks` (arXiv 2309.17453)

Everything is a fixed tensor that is written in place, so a decode step may be a CUDA graph. S sequences, K key heads, G
query heads a key head, N slots, h numbers a head.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from rltk.errors import ConfigError
from rltk.lab.model import Shape
from rltk.rollout.kv.options import KVOptions
from rltk.rollout.kv.settings import Settings


class Cache:
    """Every token keeps its own slot. `bits` under 16: keys and values are read as if stored with that many."""

    def __init__(self, shape: Shape, sequences: int, slots: int, bits: int, device: torch.device) -> None:
        self.slots, self.bits, self.scale = slots, bits, shape.head_dim**-0.5
        self.stored = torch.zeros(shape.layers, 2, sequences, shape.kv_heads, slots, shape.head_dim, device=device)
        self.number = torch.arange(slots, device=device)

    def reset(self) -> None:
        """Forget everything: other sequences come."""
        self.stored.zero_()

    def fill(self, layer: int, q: Tensor, k: Tensor, v: Tensor, length: Tensor) -> None:
        """The prompts' q [S, K, G, P, h], k and v [S, K, P, h], of which the first `length` [S] are tokens.

        They take the first P slots; what lies past a prompt's end is never read.
        """
        for number, x in enumerate((k, v)):
            self.stored[layer, number, :, :, : x.shape[2]] = quantised(x, self.bits)

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, n: Tensor) -> Tensor:
        """Store the new token's k and v [S, K, 1, h]; what its queries q [S, K, G, h] see, [S, K, G, h].

        n int64 [S]: tokens of each sequence so far, the new one included.
        """
        slot = self.slot(layer, n)[..., None, None]
        for number, x in enumerate((k, v)):
            self.stored[layer, number].scatter_(2, slot.expand_as(x), quantised(x, self.bits))
        keys, values = self.stored[layer]
        empty = (self.number >= n[:, None])[:, None, None]
        alpha = (q @ keys.mT * self.scale).masked_fill(empty, -torch.inf).softmax(-1)
        self.observe(layer, slot[..., 0], alpha, v, n)
        return alpha @ values

    def slot(self, layer: int, n: Tensor) -> Tensor:
        """Where the new token goes, [S, 1] or [S, K]."""
        return n[:, None] - 1

    def observe(self, layer: int, slot: Tensor, alpha: Tensor, v: Tensor, n: Tensor) -> None:
        """Attention alpha [S, K, G, N] after the new token, of values v [S, K, 1, h], went to `slot` [S, K or 1, 1]."""


class Streaming(Cache):
    """Attention sinks and a ring of the newest."""

    def __init__(self, settings: Settings, *arguments: Any) -> None:
        super().__init__(*arguments)
        self.sinks = settings.options.sinks

    def slot(self, layer: int, n: Tensor) -> Tensor:
        place = n[:, None] - 1
        ring = self.sinks + (place - self.sinks) % (self.slots - self.sinks)
        return torch.where(place < self.slots, place, ring)


class Evicting(Cache):
    """The slot of the lowest score is given up next; with shared heads the scores of all KV heads are added."""

    def __init__(self, settings: Settings, *arguments: Any) -> None:
        super().__init__(*arguments)
        layers, _, sequences, heads, slots, _ = self.stored.shape
        self.sinks, self.shared = settings.options.sinks, settings.options.heads == "shared"
        self.score = self.stored.new_zeros(layers, sequences, heads, slots)  # what a policy remembers of each slot
        self.victim = torch.zeros(
            layers, sequences, 1 if self.shared else heads, dtype=torch.long, device=self.stored.device
        )

    def reset(self) -> None:
        super().reset()
        self.score.zero_()

    def slot(self, layer: int, n: Tensor) -> Tensor:
        return torch.where(n[:, None] <= self.slots, n[:, None] - 1, self.victim[layer])

    def choose(self, layer: int, score: Tensor, n: Tensor, protected: Tensor | None = None) -> None:
        """The next victim by score [S, K, N]."""
        score = score.sum(1, keepdim=True) if self.shared else score
        kept = (self.number < self.sinks) | (self.number >= n[:, None])
        kept = kept[:, None] if protected is None else kept[:, None] | protected
        self.victim[layer] = score.masked_fill(kept, torch.inf).argmin(-1)


class LongFlow(Evicting):
    """score = alpha * ||v||_1, alpha the attention of the newest query; the norms are remembered."""

    def fill(self, layer: int, q: Tensor, k: Tensor, v: Tensor, length: Tensor) -> None:
        super().fill(layer, q, k, v, length)
        self.score[layer, :, :, : v.shape[2]] = quantised(v, self.bits).abs().sum(-1)

    def observe(self, layer: int, slot: Tensor, alpha: Tensor, v: Tensor, n: Tensor) -> None:
        norm = quantised(v, self.bits).abs().sum(-1)
        self.score[layer].scatter_(2, slot.expand_as(norm), norm)
        self.choose(layer, alpha.sum(2) * self.score[layer], n)


class H2O(Evicting):
    """score = attention that a slot has received, of all queries; the newest `recent` tokens are safe."""

    def __init__(self, settings: Settings, *arguments: Any) -> None:
        super().__init__(settings, *arguments)
        self.recent = settings.policy.window(self.slots, self.sinks)
        self.place = self.victim.new_zeros(*self.victim.shape, self.slots)  # of each slot's token in its sequence

    def reset(self) -> None:
        super().reset()
        self.place.copy_(self.number)

    def fill(self, layer: int, q: Tensor, k: Tensor, v: Tensor, length: Tensor) -> None:
        super().fill(layer, q, k, v, length)
        at = torch.arange(q.shape[3], device=q.device)
        logits = (q @ k.mT[:, :, None] * self.scale).masked_fill(at > at[:, None], -torch.inf)
        asked = (at < length[:, None])[:, None, None, :, None]  # queries past a prompt's end do not count
        self.score[layer, :, :, : q.shape[3]] = (logits.softmax(-1) * asked).sum((2, 3))

    def observe(self, layer: int, slot: Tensor, alpha: Tensor, v: Tensor, n: Tensor) -> None:
        self.score[layer].scatter_(2, slot.expand(*v.shape[:3]), 0.0)
        self.score[layer] += alpha.sum(2)
        at = slot.expand(-1, self.place.shape[2], -1)
        self.place[layer].scatter_(2, at, (n[:, None, None] - 1).expand_as(at))
        self.choose(layer, self.score[layer], n, self.place[layer] >= (n - self.recent)[:, None, None])


# By a policy's mode (kernels/state.py).
MODES: dict[str, Callable[..., Cache]] = {"longflow": LongFlow, "h2o": H2O, "ring": Streaming}


def build_cache(
    kv: KVOptions, bits: int, shape: Shape, sequences: int, prompt: int, response: int, device: torch.device
) -> Cache:
    """For sequences of at most `prompt` + `response` tokens; a share as budget is of that sum, as in the engine.

    ConfigError for a policy that evicts nothing while decoding, and for a budget that the longest prompt would fill.
    """
    if kv.name == "full":
        return Cache(shape, sequences, prompt + response, bits, device)
    if not kv.compressed:
        raise ConfigError(f"kv={kv.name} is vLLM's own. Fix: lab.kv_bits=8, or python -m rltk.train")
    settings = Settings(kv, prompt + response)
    if settings.policy.mode not in MODES:
        raise ConfigError(
            f"kv={kv.name} compresses prompts alone, and the lab's are short: it has policies that evict while "
            "decoding. Fix: kv=longflow, h2o or streaming, or python -m rltk.train"
        )
    slots = settings.most_slots
    if slots <= max(prompt, kv.sinks):
        raise ConfigError(
            f"kv.budget={kv.budget:g} is {slots} slots: the lab's caches must hold the longest prompt ({prompt} "
            f"tokens), the {kv.sinks} sinks and a token more. Fix: kv.budget={max(prompt, kv.sinks) + 1} or more"
        )
    return MODES[settings.policy.mode](settings, shape, sequences, slots, bits, device)


def quantised(x: Tensor, bits: int) -> Tensor:
    """x [..., h] as read back from `bits`-bit storage (symmetric, one scale a token and head); 16: as it is."""
    if bits >= 16:
        return x
    top = 2 ** (bits - 1) - 1
    scale = x.abs().amax(-1, keepdim=True).clamp(min=1e-8) / top
    return (x / scale).round() * scale
