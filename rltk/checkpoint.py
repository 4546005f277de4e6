"""Checkpoints of a run: weights, optimizer and ledger, committed together or not at all.

    checkpoints/step-000020/learner.pt     weights, Adam moments, counters, random state
    checkpoints/step-000020/state.json     step, version, ledger, best evaluation

A checkpoint is written beside its place and renamed into it: a folder of that name is always whole.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from rltk.errors import ConfigError
from rltk.files import write_json

NAME = re.compile(r"step-(\d{6,})")


class Checkpoints:
    """The last `keep` checkpoints under `folder`/checkpoints."""

    def __init__(self, folder: Path, keep: int) -> None:
        self.folder, self.keep = folder / "checkpoints", keep

    def save(self, step: int, state: dict[str, Any], save_learner: Callable[[str], None]) -> Path:
        """Commit. `save_learner(path)` writes the learner's file."""
        final = self.folder / f"step-{step:06d}"
        partial = self.folder / f"{final.name}.partial"
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        save_learner(str(partial / "learner.pt"))
        with open(partial / "learner.pt", "rb") as file:
            os.fsync(file.fileno())
        write_json(partial / "state.json", state)
        shutil.rmtree(final, ignore_errors=True)
        os.rename(partial, final)
        for old in self.steps()[: -self.keep]:
            shutil.rmtree(self.folder / f"step-{old:06d}")
        return final

    def steps(self) -> list[int]:
        """Steps of the whole checkpoints, oldest first."""
        found = [NAME.fullmatch(path.name) for path in self.folder.glob("step-*")]
        return sorted(int(match.group(1)) for match in found if match)

    def latest(self) -> tuple[dict[str, Any], str] | None:
        """(state, learner file) of the newest checkpoint; None if there is none."""
        steps = self.steps()
        if not steps:
            return None
        folder = self.folder / f"step-{steps[-1]:06d}"
        try:
            return json.loads((folder / "state.json").read_text()), str(folder / "learner.pt")
        except (OSError, ValueError) as error:
            raise ConfigError(
                f"checkpoint {folder} cannot be read ({error}). Fix: remove it to use the one before."
            ) from error
