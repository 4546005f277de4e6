"""Writing files so that a crash leaves the old content or the new one, never half of either. Standard library only."""

from __future__ import annotations

import json
import math
import os
from pathlib import Path
from typing import Any


def write_text(path: Path, text: str) -> None:
    """Replace `path` atomically: written beside it, flushed to disk, renamed over it, the folder flushed too."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "w", encoding="utf-8") as stream:
            stream.write(text)
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)  # there only if writing failed
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def write_json(path: Path, value: Any) -> None:
    """Replace `path` atomically by `value` as JSON. NaN and infinity are refused (ValueError): JSON has neither."""
    write_text(path, json.dumps(value, indent=2, allow_nan=False) + "\n")


def without_nan(value: Any) -> Any:
    """Plain figures with None for every float that is not a number, so that what was measured can be written."""
    if isinstance(value, dict):
        return {key: without_nan(item) for key, item in value.items()}
    if isinstance(value, list):
        return [without_nan(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def append_jsonl(path: Path, row: dict[str, Any]) -> None:
    """Append one line, in a single write: a kill leaves a whole line or a torn last one, which readers can tell."""
    line = json.dumps(row, allow_nan=False, separators=(", ", ": ")) + "\n"
    with open(path, "a", encoding="utf-8") as stream:
        stream.write(line)
