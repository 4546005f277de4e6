"""A compressed cache as one engine runs it: options, context, and the arithmetic of slots. A leaf: no torch, no vLLM.

It travels in vLLM's `additional_config` under KEY, to every process of the engine; an engine without KEY is stock.
"""

from __future__ import annotations

import functools
import json
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any

from rltk.errors import ConfigError
from rltk.rollout.kv.options import HEADS, KVOptions, policies
from rltk.rollout.kv.policies.policy import Policy, build_policy

KEY = "rltk_kv"
UNBOUNDED = 1 << 30  # the cap of a policy that never evicts


@dataclass(frozen=True)
class Settings:
    """options and the longest real sequence, `context`. Raises ConfigError for values that no cache can have."""

    options: KVOptions
    context: int

    def __post_init__(self) -> None:
        options = self.options
        if options.name not in policies() or not options.compressed:
            raise ConfigError(f"kv={options.name} is no cache policy; there are {', '.join(policies())}")
        if options.heads not in HEADS:
            raise ConfigError(f"kv.heads={options.heads!r} must be one of {', '.join(HEADS)}")
        if options.sinks < 0:
            raise ConfigError(f"kv.sinks={options.sinks} must not be negative")
        if options.budget <= 0:
            raise ConfigError(
                f"kv.budget={options.budget:g} keeps nothing. Fix: tokens (1 or more) or a share below 1."
            )
        if options.budget < 1 and self.policy.evicts and self.policy.pseudo:
            raise ConfigError(
                f"kv.budget={options.budget:g} is a share: of the prompt for one half of {options.name}, of the whole "
                "sequence for the other. Fix: kv.budget in tokens."
            )

    @cached_property
    def policy(self) -> Policy:
        return build_policy(self.options.name, self.options.options)

    @property
    def pseudo(self) -> int:
        return self.policy.pseudo

    @property
    def max_model_len(self) -> int:
        """vLLM's: pseudo tokens count in its sequences."""
        return self.context + self.pseudo

    @cached_property
    def cap(self) -> int:
        """Slots that one sequence may hold."""
        return self.options.slots(self.context) if self.policy.evicts else UNBOUNDED

    def kept(self, prompt: int) -> int:
        """Tokens of a real prompt that get a slot. An evicting policy leaves the first decode step its own slot."""
        if self.policy.evicts:
            return min(prompt, self.cap - 1)
        return min(prompt, max(self.options.slots(prompt), self.options.sinks + 1))

    def slots(self, prompt: int, max_tokens: int) -> int:
        """The most slots that a request of `prompt` real tokens and `max_tokens` to sample will ever hold."""
        return min(self.kept(prompt) + max_tokens, self.cap, self.context)

    @property
    def most_slots(self) -> int:
        """Of any request."""
        return min(self.cap, self.context)

    def to_dict(self) -> dict[str, Any]:
        return {**asdict(self.options), "budget": float(self.options.budget), "context": self.context}

    def to_json(self) -> str:
        return json.dumps(self.to_dict(), sort_keys=True)

    @classmethod
    def from_json(cls, text: str) -> Settings:
        return _parse(text)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Settings:
        values = dict(values)
        context = values.pop("context", None)
        if not isinstance(context, int) or context < 2:
            raise ConfigError(f"additional_config[{KEY!r}] needs a context in tokens, not {context!r}")
        try:
            return cls(KVOptions(**values), context)
        except TypeError as error:
            raise ConfigError(f"additional_config[{KEY!r}] = {values}: {error}") from error

    @classmethod
    def of(cls, vllm_config: Any) -> Settings | None:
        """The settings of an engine, None for one with a stock cache."""
        if not compressed(vllm_config):
            return None
        return _parse(json.dumps(vllm_config.additional_config[KEY], sort_keys=True))


def compressed(vllm_config: Any) -> bool:
    """Whether an engine asks for a compressed cache."""
    extra = getattr(vllm_config, "additional_config", None)
    return isinstance(extra, dict) and extra.get(KEY) is not None


@functools.lru_cache(maxsize=64)  # asked for with every request
def _parse(text: str) -> Settings:
    return Settings.from_dict(json.loads(text))
