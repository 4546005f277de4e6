"""Tools by name: what the entries of a run's `tools.use` mean.

  python | calculator | module:function (rollout/tools/function.py) | module:Class with reset and step (environment.py)

`signatures` starts nothing and is cheap: the checks before a run and the turn loop ask it. `build` is the executor's.
"""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Any

from rltk.errors import ConfigError
from rltk.rollout.tools import calculator, function, python
from rltk.rollout.tools.environment import PARAMETERS, EnvironmentTool
from rltk.rollout.tools.options import ToolOptions
from rltk.rollout.tools.types import Signature, Tool

BUILT_IN = ("python", "calculator")


@dataclass(frozen=True)
class Entry:
    signature: Signature
    make: Callable[[], Tool]
    environment: bool = False


def signatures(options: ToolOptions) -> list[Signature]:
    """What the model may call, in the order of `tools.use`. Raises ConfigError naming the entry that is wrong."""
    return [entry.signature for entry in entries(options)]


def environment(options: ToolOptions) -> bool:
    """The run's one tool is an environment: every turn of the model is an action."""
    return any(entry.environment for entry in entries(options))


def build(options: ToolOptions) -> dict[str, Tool]:
    """Raises ConfigError also where this machine cannot give a tool what it needs."""
    return {entry.signature.name: entry.make() for entry in entries(options)}


def entries(options: ToolOptions) -> list[Entry]:
    found: dict[str, Entry] = {}
    for written in options.use:
        entry = _entry(written, options)
        name = entry.signature.name
        if name in found:
            raise ConfigError(f"tools.use: {written} is called {name!r}, as another tool of the run is; rename one")
        found[name] = entry
    if len(found) > 1 and any(entry.environment for entry in found.values()):
        names = ", ".join(options.use)
        raise ConfigError(f"tools.use=[{names}]: an environment is a run's only tool, as every turn is its action")
    return list(found.values())


def _entry(written: str, options: ToolOptions) -> Entry:
    if written == "python":
        return Entry(python.signature(options), lambda: python.PythonTool(options))
    if written == "calculator":
        return Entry(calculator.SIGNATURE, calculator.Calculator)
    if ":" not in written:
        near = _nearest(written, BUILT_IN)
        raise ConfigError(
            f"tools.use: {written!r} is not known{near}. Tools: {', '.join(BUILT_IN)}; your own: module:function, or "
            "module:Class with reset and step"
        )
    target = _import(written)
    if inspect.isclass(target):
        return _environment_entry(target, written, options.slots)
    if not inspect.isfunction(target):
        raise ConfigError(f"tools.use: {written} is a {type(target).__name__}; a tool is a function or a class")
    signature = function.signature_of(target, written)
    return Entry(signature, lambda: function.FunctionTool(target, signature, options.slots))


def _environment_entry(target: type, written: str, slots: int) -> Entry:
    for method in ("reset", "step"):
        if not callable(getattr(target, method, None)):
            raise ConfigError(
                f"tools.use: {written} is a class without {method}; an environment has reset(record_data) and "
                "step(action), and any other tool is a function"
            )
    try:
        inspect.signature(target).bind()
    except (TypeError, ValueError) as error:
        raise ConfigError(f"tools.use: {written} cannot be built without arguments: {error}") from None
    signature = Signature(target.__name__, inspect.getdoc(target) or "", PARAMETERS)
    return Entry(signature, lambda: EnvironmentTool(target, signature, slots), environment=True)


def _import(written: str) -> Any:
    module_name, _, attribute = written.partition(":")
    try:
        target: Any = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        if error.name is not None and (module_name == error.name or module_name.startswith(f"{error.name}.")):
            raise ConfigError(
                f"tools.use: there is no module {error.name!r} (asked for as {written}); is its folder the working "
                "directory or on PYTHONPATH?"
            ) from error
        raise ConfigError(f"tools.use: {module_name} imports {error.name!r}, which is not installed here") from error
    except (Exception, SystemExit) as error:  # the user's module runs here for the first time
        raise ConfigError(f"tools.use: importing {module_name} raised {type(error).__name__}: {error}") from error
    for name in attribute.split("."):
        if not hasattr(target, name):
            near = _nearest(name, [known for known in dir(target) if not known.startswith("_")])
            raise ConfigError(f"tools.use: {module_name} has no attribute {name!r} (asked for as {written}){near}")
        target = getattr(target, name)
    return target


def _nearest(word: str, known: Any) -> str:
    close = get_close_matches(word, list(known), n=1, cutoff=0.5)
    return f" (did you mean {close[0]}?)" if close else ""
