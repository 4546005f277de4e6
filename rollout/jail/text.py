"""What a model is shown of a program's output: text without control characters, and without this machine's paths."""

from __future__ import annotations

import re
from collections.abc import Iterable

# Escape sequences of terminals, then every control character but tab and newline.
ESCAPES = re.compile(r"\x1b\[[0-?]*[ -/]*[@-~]|\x1b\][^\x07\x1b]*(?:\x07|\x1b\\)?|\x1b[@-_]")
CONTROLS = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")
PYTHON = "<python>"


def shown(raw: bytes, hidden: Iterable[str] = ()) -> str:
    """`raw` as UTF-8, what is not replaced by U+FFFD; `hidden` prefixes of paths become <python>."""
    text = raw.decode(errors="replace").replace("\r\n", "\n")
    for prefix in hidden:
        text = text.replace(prefix, PYTHON)
    return CONTROLS.sub("\ufffd", ESCAPES.sub("", text))
