"""Prompt templates: versioned text files, filled with escaped values in one pass.

    [system]            a message each; other sections are for later turns
    [user]
    {{problem}} {{?reference}}The answer: {{reference}}{{/reference}} {{parts}}
    [part]              once for each part (a paragraph, a response); joined, they are {{parts}}

A shipped file never changes: another wording is another file, `fapo.v2.txt`. The version that goes into cache keys
holds a digest of the text all the same, for templates of users do change.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rltk.errors import ConfigError
from rltk.rewards.genrm.escape import escape

SHIPPED = Path(__file__).parent / "templates"
_SECTION = re.compile(r"^\[([a-z_]+)\]$", re.MULTILINE)
_OPTIONAL = re.compile(r"\{\{\?(\w+)\}\}(.*?)\{\{/\1\}\}", re.DOTALL)
_PLACE = re.compile(r"\{\{(\w+)\}\}")

Values = Mapping[str, str | None]


class Template:
    """`name`: a shipped template (`fapo.v1`) or the path of a .txt file; `needs`: the places it must have, by section.

    Raises ConfigError: no such file, a section or a place is missing, or a place is none that the judge fills.
    """

    def __init__(self, name: str, needs: Mapping[str, Sequence[str]], optional: Sequence[str] = ()) -> None:
        text = _read(name)
        names = _SECTION.findall(text)
        self.sections = dict(zip(names, (body.strip() for body in _SECTION.split(text)[2::2]), strict=True))
        self.version = f"{name.removesuffix('.txt')}:{hashlib.sha256(text.encode()).hexdigest()[:12]}"
        for section in needs:
            if section not in self.sections:
                raise ConfigError(f"template {name}: section [{section}] is missing; the judge needs it")
        for section, body in self.sections.items():
            places = needs.get(section, ())
            used = set(_PLACE.findall(body))
            for place in set(places) - used - set(optional):
                raise ConfigError(f"template {name}: [{section}] has no {{{{{place}}}}}, which the judge must show")
            for place in used - set(places):
                known = ", ".join(places) or "none"
                raise ConfigError(f"template {name}: nothing fills {{{{{place}}}}} of [{section}]; known: {known}")

    def messages(self, values: Values, parts: Sequence[Values] = ()) -> tuple[dict[str, str], ...]:
        """The chat: [system], if the template has one, and [user]."""
        roles = [role for role in ("system", "user") if role in self.sections]
        return tuple({"role": role, "content": self.fill(role, values, parts)} for role in roles)

    def fill(self, section: str, values: Values, parts: Sequence[Values] = ()) -> str:
        """The section with every value escaped. A value of None takes its {{?optional}} block away."""
        body = _OPTIONAL.sub(lambda block: "" if values.get(block[1]) is None else block[2], self.sections[section])
        inner = "\n".join(self.fill("part", part) for part in parts)
        return _PLACE.sub(lambda place: inner if place[1] == "parts" else escape(values[place[1]] or ""), body)


def _read(name: Any) -> str:
    if not isinstance(name, str):
        raise ConfigError(f"template {name!r} is not the name of one, nor the path of a .txt file")
    path = Path(name) if name.endswith(".txt") else SHIPPED / f"{name}.txt"
    if not path.is_file():
        known = ", ".join(sorted(file.stem for file in SHIPPED.glob("*.txt")))
        raise ConfigError(f"template {name!r}: there is no {path}. Shipped: {known}; or give the path of a .txt file")
    return path.read_text(encoding="utf-8")
