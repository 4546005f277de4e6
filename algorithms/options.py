"""Options of objectives and corrections: declared where they are used, checked when one is built.

An option is a class attribute, `clip_low: float = option(0.2, low=0.0, high=1.0)`. A subclass may set another default
by plain assignment (`clip_low = 0.025`) and keeps the range, or declare the option anew.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any


@dataclass(frozen=True)
class Option:
    """One option: its default, its type (that of the default) and what it may be."""

    default: Any
    kind: type
    low: float | None = None  # smallest value allowed
    above: float | None = None  # every value allowed is greater than this
    high: float | None = None  # largest value allowed
    choices: tuple[Any, ...] | None = None
    optional: bool = False  # None is allowed and turns the thing off

    def check(self, owner: str, name: str, value: Any) -> Any:
        """`value` as the option's type; ValueError naming option, value and what is allowed."""
        if value is None and self.optional:
            return None
        if self.kind is float and type(value) is int:
            value = float(value)
        if type(value) is not self.kind or not self._holds(value):
            raise ValueError(f"{owner}: option {name}={value!r} is not allowed: it must be {self.allowed()}")
        return value

    def allowed(self) -> str:
        """The allowed values in words."""
        if self.choices is not None:
            words = "one of " + ", ".join(map(str, self.choices))
        else:
            bounds = [(">=", self.low), (">", self.above), ("<=", self.high)]
            words = {bool: "true or false", float: "a number", int: "an integer", str: "a string"}[self.kind]
            words += " and".join(f" {sign} {bound:g}" for sign, bound in bounds if bound is not None)
        return words + (" or null" if self.optional else "")

    def _holds(self, value: Any) -> bool:
        if self.choices is not None:
            return value in self.choices
        if self.kind in (bool, str):
            return True
        return (
            math.isfinite(value)
            and (self.low is None or value >= self.low)
            and (self.above is None or value > self.above)
            and (self.high is None or value <= self.high)
        )


def option(default: Any, *, kind: type | None = None, **rule: Any) -> Any:
    """Declare an option. `kind` is needed only where the default is None; `rule` holds fields of `Option`."""
    return Option(default, kind or type(default), optional=rule.pop("optional", default is None), **rule)


def nearest(name: str, known: Iterable[str]) -> str:
    """' (nearest known: x)' or '', for error messages."""
    match = difflib.get_close_matches(name, list(known), n=1, cutoff=0.0)
    return f" (nearest known: {match[0]})" if match else ""


class Configurable:
    """Base of classes built from options. Keyword arguments become attributes; what is not given takes its default."""

    def __init__(self, **values: Any) -> None:
        owner, declared = type(self).__name__, self.options()
        for name in values:
            if name not in declared:
                known = ", ".join(declared) or "none"
                raise ValueError(f"{owner}: unknown option {name!r}{nearest(name, declared)}; options are: {known}")
        for name, rule in declared.items():
            setattr(self, name, rule.check(owner, name, values.get(name, rule.default)))

    @classmethod
    def options(cls) -> dict[str, Option]:
        """Every option of the class, inherited ones first."""
        table: dict[str, Option] = {}
        for base in reversed(cls.__mro__):
            for name, value in vars(base).items():
                if isinstance(value, Option):
                    table[name] = value
                elif name in table:
                    table[name] = replace(table[name], default=value)
        return table

    def __repr__(self) -> str:
        return f"{type(self).__name__}({', '.join(f'{name}={getattr(self, name)!r}' for name in self.options())})"
