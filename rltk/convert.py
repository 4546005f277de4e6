"""Plain mappings into the frozen dataclasses of rltk.config, strictly: no key is ignored, no value is coerced.

The one coercion is int -> float. Where a dataclass has a field `options`, keys that are not its own go there.
"""

from __future__ import annotations

import math
import types
import typing
from collections.abc import Mapping
from dataclasses import MISSING, fields, is_dataclass
from typing import Any, TypeVar

from rltk.errors import ConfigError
from rltk.nearest import nearest_key

T = TypeVar("T")
KINDS = {bool: "true or false", int: "a whole number", float: "a number", str: "text"}
EXAMPLES = {bool: "true", int: "1", float: "0.5", str: "text"}


def convert(cls: type[T], given: Mapping[str, Any], where: str = "") -> T:
    """An instance of the dataclass `cls` from a mapping; `where` is the dotted path that error messages begin with."""
    hints = typing.get_type_hints(cls)
    own = {f.name: f for f in fields(cls)}  # type: ignore[arg-type]
    values: dict[str, Any] = {}
    options: dict[str, Any] = {}
    for key, value in given.items():
        path = f"{where}.{key}" if where else str(key)
        if key in own:
            values[key] = _value(hints[key], value, path)
        elif "options" in own:
            options[key] = _free(value, path)
        else:
            raise unknown_key(path, value, [f"{where}.{name}" if where else name for name in own])
    if options:
        values["options"] = {**values.get("options", {}), **options}
    for name, field in own.items():
        if name not in values and field.default is MISSING and field.default_factory is MISSING:
            raise ConfigError(f"{where}.{name} has no value: set it")
    return cls(**values)


def unknown_key(path: str, value: Any, known: list[str]) -> ConfigError:
    """The error for a key that nobody reads, with the nearest one that somebody does."""
    near = nearest_key(path, known)
    parent = path.rsplit(".", 1)[0] + "." if "." in path else ""
    siblings = [key for key in known if key.startswith(parent) and "." not in key[len(parent) :]]
    fix = f"the nearest known key is {near}" if near else "no known key comes near; --help lists the main ones"
    listed = f". Keys there: {', '.join(siblings)}" if parent and siblings else ""
    return ConfigError(f"unknown key {path} (value {value!r}): {fix}{listed}")


def _value(hint: Any, value: Any, path: str) -> Any:
    """`value` as the annotated type: a dataclass, dict[str, Any], list of scalars, a scalar, or one of them | None."""
    if isinstance(hint, types.UnionType):
        if value is None:
            return None
        hint = next(arg for arg in typing.get_args(hint) if arg is not type(None))
    if is_dataclass(hint):
        if isinstance(value, Mapping):
            return convert(hint, value, path)  # type: ignore[arg-type]
        names = ", ".join(f.name for f in fields(hint))
        raise ConfigError(f"{path} = {value!r}: {path} is a group of keys ({names}); set one, as {path}.<key>=<value>")
    if typing.get_origin(hint) is dict:
        if isinstance(value, Mapping):
            return {str(key): _free(item, f"{path}.{key}") for key, item in value.items()}
        raise ConfigError(f"{path} = {value!r} must be a mapping; set one entry, as in {path}.<option>=<value>")
    if typing.get_origin(hint) is list:
        if not isinstance(value, list):
            raise ConfigError(f"{path} = {value!r} must be a list; write it as in {path}=[{value}]")
        return [_scalar(typing.get_args(hint)[0], item, f"{path}[{index}]") for index, item in enumerate(value)]
    return _scalar(hint, value, path)


def _scalar(kind: type, value: Any, path: str) -> Any:
    if kind is float and type(value) is int:
        value = float(value)
    if type(value) is not kind:
        example = f"""'{path}="{value}"'""" if kind is str and value is not None else f"{path}={EXAMPLES[kind]}"
        shown = "null" if value is None else f"{value!r} ({type(value).__name__})"
        raise ConfigError(f"{path} = {shown} must be {KINDS[kind]}; write it as in {example}")
    if kind is float and not math.isfinite(value):
        raise ConfigError(f"{path} = {value} must be a finite number; write it as in {path}=0.5")
    return value


def _free(value: Any, path: str) -> Any:
    """A value of a free option: plain JSON types, kept as they are."""
    if isinstance(value, Mapping):
        return {str(key): _free(item, f"{path}.{key}") for key, item in value.items()}
    if isinstance(value, list):
        return [_free(item, f"{path}[{index}]") for index, item in enumerate(value)]
    if value is None or isinstance(value, str | int | float | bool):
        return value
    kinds = "text, a number, true, false, null, a list or a mapping"
    raise ConfigError(f"{path} = {value!r} ({type(value).__name__}) must be plain: {kinds}")
