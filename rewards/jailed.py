"""Scorers that call Python's eval on an answer, run so that the eval happens in a jail.

Only the evaluation goes inside: the jail gets the answer's text and gives back a plain value, which the scorer then
compares with the reference outside. So no reference answer ever enters, and what an answer prints, forges or finds
inside can be worth no more than a value written down.
"""

from __future__ import annotations

import ast
import json
import types
from collections.abc import Callable
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from rltk.errors import ConfigError, InfrastructureError
from rltk.rollout.tools.options import JailOptions

if TYPE_CHECKING:
    from rltk.rollout.jail import Jail

LONGEST = 20_000  # characters of an answer that is evaluated
# Below the ten seconds that scoring one sample may take (reward.deadline_s).
OPTIONS = {"cpu_s": 2.0, "wall_factor": 3.0, "memory_mib": 512, "output_kib": 256}
# What iterates becomes lists; the value stands in the last line, as evaluating may print.
PROGRAM = """
import json, sys

def plain(value):
    if value is None or isinstance(value, (str, int, float)):
        return value
    return [plain(item) for item in value]

value = plain(eval(sys.stdin.read()))
print()
print(json.dumps(value))
"""


class NoValueError(Exception):
    """The answer has no value: as if eval had raised."""


@lru_cache(maxsize=2)
def scoring_jail(isolation: str = "strict") -> Jail:
    """One jail a process. Raises ConfigError where this machine cannot build it."""
    from rltk.rollout.jail import Jail

    return Jail(JailOptions(isolation=isolation, **OPTIONS))


def evaluate(text: str, jail: Jail) -> Any:
    """What `eval(text)` is, as None, text, numbers and lists. Literals are read here; the rest runs in the jail.

    Raises NoValueError where it has no such value or took too long, InfrastructureError where the jail failed.
    """
    if len(text) > LONGEST:
        raise NoValueError(f"over {LONGEST} characters")
    try:
        return ast.literal_eval(text)
    except SyntaxError as error:
        raise NoValueError("not an expression") from error
    except (ValueError, TypeError, RecursionError, MemoryError):
        pass  # an expression, but no literal
    result = jail.run(PROGRAM, stdin=text)
    if result.status == "infra_error":
        raise InfrastructureError(f"the jail that evaluates answers failed: {result.text}")
    if result.status != "ok":
        raise NoValueError(f"{result.status} {result.limit}".strip())
    try:
        return json.loads(result.text.strip().rpartition("\n")[2])
    except (ValueError, RecursionError) as error:
        raise NoValueError("no plain value") from error


def with_jailed_eval(score: Callable[..., float], jail: Jail) -> Callable[..., float]:
    """The plain function `score` with the global name `eval` bound to `evaluate` in it, and nothing else changed.

    A failing jail is an InfrastructureError, although scorers of this kind swallow whatever their eval raises.
    Raises ConfigError if `score` does not call a global `eval`: then it is not what this was written for.
    """
    if "eval" not in score.__code__.co_names:
        raise ConfigError(f"{score.__module__}.{score.__qualname__} does not call eval; install the pinned version")
    failures: list[InfrastructureError] = []

    def jailed_eval(text: str) -> Any:
        try:
            return evaluate(text, jail)
        except InfrastructureError as error:
            failures.append(error)
            raise

    space = {**score.__globals__, "eval": jailed_eval}
    bound = types.FunctionType(score.__code__, space, score.__name__, score.__defaults__, score.__closure__)

    def scored(*arguments: Any) -> float:
        failures.clear()
        value = bound(*arguments)
        if failures:
            raise failures[0]
        return value

    return scored
