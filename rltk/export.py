"""Copy a run's model out of its folder: `python -m rltk.export runs/<name> out=<folder> [which=final|best]`.

What comes out is a plain Hugging Face folder: weights, config, tokenizer and chat template, for transformers and vLLM.
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from rltk.cli import run_entry
from rltk.errors import ConfigError
from rltk.nearest import meant

FOLDERS = {"final": "model", "best": "best"}  # best: by held-out accuracy
USAGE = "usage: python -m rltk.export runs/<name> out=<folder> [which=final|best]"


def export(run_dir: Path, out: Path, which: str = "final") -> Path:
    """Copy the model; returns `out`. ConfigError if there is none, or if `out` already holds something."""
    if which not in FOLDERS:
        raise ConfigError(f"which={which!r} is not one of {', '.join(FOLDERS)}")
    source = run_dir / FOLDERS[which]
    if not (source / "config.json").is_file() or not list(source.glob("*.safetensors")):
        raise ConfigError(f"{source} holds no model: has the run got that far? (see {run_dir / 'summary.json'})")
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ConfigError(f"out={out} exists and is not empty: name another folder, or remove it")
    out.parent.mkdir(parents=True, exist_ok=True)
    partial = out.with_name(f".{out.name}.{os.getpid()}.partial")
    try:
        shutil.copytree(source, partial)
        os.replace(partial, out)  # a folder that is there is whole
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return out


def main(argv: list[str]) -> int:
    if not argv or argv[0] in ("-h", "--help"):
        print(USAGE)
        return 0 if argv else 2
    options = {key: value for key, _, value in (argument.partition("=") for argument in argv[1:])}
    for key in options.keys() - {"out", "which"}:
        raise ConfigError(f"{key!r} is no option of export{meant(key, ('out', 'which'))}. {USAGE}")
    if not options.get("out"):
        raise ConfigError(f"out=<folder> is missing. {USAGE}")
    print(export(Path(argv[0]), Path(options["out"]), options.get("which", "final")))
    return 0


if __name__ == "__main__":
    run_entry(main)
