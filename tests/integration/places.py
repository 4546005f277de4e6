"""Where things are, for tests."""

from pathlib import Path

import rltk

ROOT = Path(__file__).resolve().parents[2]
TINY = Path(rltk.__file__).parent / "models" / "tiny"
