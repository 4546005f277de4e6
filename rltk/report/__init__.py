"""report.html: a run on one self-contained page, from the files it left. `python -m rltk.report runs/<name>`"""

from __future__ import annotations

from pathlib import Path

from rltk.files import write_text
from rltk.report.data import load
from rltk.report.page import render


def build(run_dir: Path | str) -> Path:
    """Write `run_dir`/report.html and return its path. Works on a run that is still going on, or that was killed.

    ConfigError if the folder holds neither rows nor a summary: there is nothing to report.
    """
    run = load(Path(run_dir))
    target = run.folder / "report.html"
    write_text(target, render(run))
    return target
