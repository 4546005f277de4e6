"""Which files hold a formula, and which tests must see it broken."""

from __future__ import annotations

from pathlib import Path

TESTS = "tests/unit/algorithms"
FOLDERS = ("algorithms", "algorithms/corrections")
WITHOUT_A_FORMULA = {"__init__", "options", "registry"}

# Shared parts, and files with more tests than their own. The rest have `test_<name>`, or `test_correction_<name>`.
SEVERAL = {
    "advantages": ("advantages", "rloo", "reinforce_pp"),
    "aggregation": ("aggregation", "corrections"),
    "batch": ("token_batch",),
    "clipping": ("clipping", "grpo"),
    "correction": ("corrections", "grpo"),
    "ctpo": ("ctpo", "ctpo_enumerated", "build"),
    "grpo": ("grpo", "build"),
    "kl": ("kl_penalty", "grpo"),
    "none": ("corrections", "grpo"),
    "objective": ("objective", "grpo", "corrections", "kl_penalty", "token_batch", "dr_grpo", "aggregation", "build"),
    "overlong": ("dapo",),
    "tis": ("corrections",),
}


def files(root: Path) -> list[str]:
    """Paths of every file with a formula, relative to the root."""
    found = [path for folder in FOLDERS for path in sorted((root / folder).glob("*.py"))]
    return [path.relative_to(root).as_posix() for path in found if path.stem not in WITHOUT_A_FORMULA]


def suites_of(file: str) -> list[str]:
    path = Path(file)
    own = f"correction_{path.stem}" if path.parent.name == "corrections" else path.stem
    return [f"{TESTS}/test_{name}.py" for name in SEVERAL.get(path.stem, (own,))]
