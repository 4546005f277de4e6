"""What a cache policy is, and how one is added.

A policy decides two things. Which tokens of a prompt keep a slot: `scores` and `choose`, once a layer, at prefill.
Which slot a new token overwrites when all are taken: `mode`, one that the decode kernel knows (kernels/state.py):

    append     none: decoding keeps every token it makes; a request holds budget + max_tokens slots
    longflow   the least attention x ||v||_1 of the step before        ring   the oldest after the sinks
    h2o        the least attention so far, the newest `recent` apart

To add a policy `mine`: a file rollout/kv/policies/mine.py with one class `Mine(Policy)`, whose constructor's keyword
arguments are its options (`kv.options`), each with a default; and conf/kv/mine.yaml with `name: mine`. Nothing else
is edited. A new way to pick a victim needs a mode in kernels/ first.
"""

from __future__ import annotations

import importlib
import inspect
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, ClassVar

from rltk.errors import ConfigError

if TYPE_CHECKING:
    from torch import Tensor

PromptScores = Callable[..., "Tensor"]  # kernels/prompt_scores.py: (query, key, scale, reduce) -> [N, Hkv, T]


class Policy(ABC):
    """mode: see above. pseudo: tokens appended to a prompt that only observe it (dapq)."""

    mode: ClassVar[str] = "append"
    pseudo: int = 0

    @property
    def evicts(self) -> bool:
        """Whether decoding gives tokens up: then the budget bounds the whole sequence, else only the prompt."""
        return self.mode != "append"

    def window(self, keep: int, sinks: int) -> int:
        """How many of a prompt's last tokens always stay, of `keep`."""
        return 0

    @abstractmethod
    def scores(self, query: Tensor, key: Tensor, prompt: int, scale: float, prompt_scores: PromptScores) -> Tensor:
        """fp32 [N, Hkv, prompt]: what each token of N prompts of one length is worth to each KV head.

        query [N, T, Hq, D], key [N, T, Hkv, D], positions applied; T = prompt + pseudo, the pseudo tokens last.
        """

    def choose(self, scores: Tensor, keep: int, sinks: int, shared: bool) -> Tensor:
        """int64 [N, Hv, keep], ascending: the tokens that keep a slot. Hv is 1 (shared by all heads) or Hkv."""
        scores = scores.sum(1, keepdim=True) if shared else scores.clone()
        prompt = scores.shape[2]
        scores[..., prompt - min(self.window(keep, sinks), keep - sinks) :] = float("inf")
        scores[..., :sinks] = float("inf")
        return scores.topk(keep).indices.sort().values


def build_policy(name: str, options: dict[str, Any]) -> Policy:
    """The policy `name` with its options. Raises ConfigError for an option it does not have or a value it refuses."""
    module = importlib.import_module(f"rltk.rollout.kv.policies.{name}")
    found = [c for c in vars(module).values() if inspect.isclass(c) and c.__module__ == module.__name__]
    if len(found) != 1 or not issubclass(found[0], Policy):
        raise ConfigError(f"rollout/kv/policies/{name}.py must define one class, a Policy; it defines {found}")
    known = list(inspect.signature(found[0]).parameters)
    unknown = sorted(set(options) - set(known))
    if unknown:
        raise ConfigError(f"kv={name} has no option {', '.join(unknown)}; it has {', '.join(known) or 'none'}")
    return found[0](**options)


def whole(name: str, value: Any, least: int) -> int:
    """An option that counts tokens. Raises ConfigError."""
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise ConfigError(f"kv.{name}={value!r} must be a whole number of at least {least}")
    return value
