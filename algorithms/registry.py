"""Finding a class by name: the module of that name in a package of ours, or the user's own `module:Class`.

There is no table to edit: `grpo` is whatever objective `rltk/algorithms/grpo.py` defines.
"""

from __future__ import annotations

import importlib
import pkgutil
from typing import TypeVar

from rltk.algorithms.options import nearest

Base = TypeVar("Base")


def find_class(name: str, package: str, base: type[Base]) -> type[Base]:
    """The subclass of `base` that `name` stands for.

    `name`: a module of `package` that defines exactly one subclass of `base`, or `module:Class` of the user's own.
    Raises ValueError naming what was looked for and the nearest known name.
    """
    if ":" in name:
        return _users_class(name, base)
    if name in _modules(package):
        found = _only_class(package, name, base)
        if found is not None:
            return found
    known = available(package, base)
    raise ValueError(
        f"unknown {base.__name__.lower()} {name!r}{nearest(name, known)}; known: {', '.join(known)}; "
        f"or give your own as module:Class"
    )


def available(package: str, base: type[Base]) -> list[str]:
    """Names of the modules of `package` that define a subclass of `base`."""
    return sorted(name for name in _modules(package) if _only_class(package, name, base) is not None)


def _modules(package: str) -> list[str]:
    return [module.name for module in pkgutil.iter_modules(importlib.import_module(package).__path__)]


def _only_class(package: str, name: str, base: type[Base]) -> type[Base] | None:
    """The one public subclass of `base` that the module itself defines (not those it imports), if any."""
    module = importlib.import_module(f"{package}.{name}")
    classes = [value for value in vars(module).values() if isinstance(value, type) and issubclass(value, base)]
    own = [c for c in classes if c is not base and c.__module__ == module.__name__ and not c.__name__.startswith("_")]
    if len(own) > 1:
        names = ", ".join(c.__name__ for c in own)
        raise ValueError(f"{module.__name__} defines {names}; a module defines one {base.__name__.lower()}")
    return own[0] if own else None


def _users_class(path: str, base: type[Base]) -> type[Base]:
    module_name, _, attribute = path.partition(":")
    try:
        module = importlib.import_module(module_name)
    except Exception as error:  # the user's module may fail in any way; the cause is chained
        raise ValueError(f"{path}: importing module {module_name!r} failed: {error}") from error
    if not hasattr(module, attribute):
        raise ValueError(f"{path}: module {module_name!r} has no {attribute!r}{nearest(attribute, vars(module))}")
    value = getattr(module, attribute)
    if not (isinstance(value, type) and issubclass(value, base)):
        raise ValueError(f"{path} is {value!r}; it must be a subclass of {base.__module__}.{base.__name__}")
    return value
