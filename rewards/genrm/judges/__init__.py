"""Judges by name: `fapo` is the class in fapo.py that calls itself so. There is no table to edit."""

from __future__ import annotations

import importlib
import inspect
import pkgutil
from difflib import get_close_matches
from typing import Any

from rltk.errors import ConfigError
from rltk.rewards.genrm.options import GenRMOptions
from rltk.rewards.genrm.types import Comparer, Judge

WHEN = ("right", "wrong", "all")


def judge_names() -> list[str]:
    return sorted(module.name for module in pkgutil.iter_modules(__path__))


def build_judge(name: str, **options: Any) -> Judge | Comparer:
    """The judge of a module here, or the user's own `module:Class`, built with its options.

    Raises ConfigError naming what is unknown, the nearest known name, or the option that is not allowed.
    """
    judge_class = _users_class(name) if ":" in name else _our_class(name)
    if not (callable(getattr(judge_class, "judge", None)) or callable(getattr(judge_class, "compare", None))):
        raise ConfigError(f"judge {name}: {judge_class.__name__} has neither judge(question, ask) nor compare(...)")
    parameters = inspect.signature(judge_class).parameters
    for option in options:
        if option not in parameters and not any(p.kind is p.VAR_KEYWORD for p in parameters.values()):
            known = ", ".join(parameters) or "none"
            raise ConfigError(f"judge {name}: unknown option {option!r}{_nearest(option, parameters)}; known: {known}")
    try:
        judge = judge_class(**options)
    except ConfigError:
        raise
    except Exception as error:  # the user's own may fail in any way; the cause is chained
        words = f"{type(error).__name__}: {error}"
        raise ConfigError(f"judge {name} cannot be built with {options}: {words}") from error
    for attribute in ("name", "version"):
        if not isinstance(getattr(judge, attribute, None), str):
            raise ConfigError(f"judge {name}: {judge_class.__name__} has no `{attribute}`, which is a text")
    for method in ("judge", "compare"):
        if callable(found := getattr(judge, method, None)) and not inspect.iscoroutinefunction(found):
            raise ConfigError(f"judge {name}: {judge_class.__name__}.{method} must be `async def`; it is awaited")
    return judge


def asked_when(options: GenRMOptions) -> str:
    """Which samples of a run its judge is for, by what the rule found: right | wrong | all (the judge's own `when`).
    ConfigError for a judge that only compares, and as `build_judge` raises."""
    judge = build_judge(options.judge, **options.judge_options)
    if not callable(getattr(judge, "judge", None)):
        raise ConfigError(
            f"reward.genrm.judge = {options.judge!r} compares responses; a run asks about each response as it ends: "
            "take a judge of one (fapo, answer_equivalence, ensemble, module:Class)"
        )
    when = getattr(judge, "when", "all")
    if when not in WHEN:
        raise ConfigError(f"judge {options.judge}: when = {when!r} must be one of {', '.join(WHEN)}")
    return when


def _our_class(name: str) -> type[Any]:
    if name not in judge_names():
        known = ", ".join(judge_names())
        raise ConfigError(f"unknown judge {name!r}{_nearest(name, judge_names())}; known: {known}; or module:Class")
    module = importlib.import_module(f"{__name__}.{name}")
    return next(c for c in vars(module).values() if inspect.isclass(c) and vars(c).get("name") == name)


def _users_class(path: str) -> type[Any]:
    module_name, _, attribute = path.partition(":")
    try:
        target = getattr(importlib.import_module(module_name), attribute, None)
    except Exception as error:  # the user's module may fail in any way; the cause is chained
        raise ConfigError(f"judge {path}: importing {module_name!r} failed: {error}") from error
    if not inspect.isclass(target):
        raise ConfigError(f"judge {path}: {module_name!r} has no class {attribute!r}")
    return target


def _nearest(word: str, known: Any) -> str:
    close = get_close_matches(word, list(known), n=1, cutoff=0.5)
    return f" (did you mean {close[0]}?)" if close else ""
