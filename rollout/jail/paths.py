"""What jailed code may read: the standard library, shared libraries, time zones, and packages by name."""

from __future__ import annotations

import inspect
import os
import re
import subprocess
import sys
import sysconfig
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass
from functools import lru_cache
from importlib import metadata
from pathlib import Path

PACKAGES = ("numpy", "scipy", "sympy", "gmpy2", "networkx", "pandas")  # of these, what is installed
NOT_STANDARD = ("site-packages", "dist-packages", "test", "idlelib", "ensurepip")
DEVICES = (Path("/dev/null"),)
COMPILE_DEADLINE_S = 120.0


@dataclass(frozen=True)
class Readable:
    files: tuple[Path, ...]  # may be read, with all below them
    listings: tuple[Path, ...]  # folders whose names may be listed: Python's import looks there
    folders: tuple[str, ...]  # those of them that hold packages
    modules: tuple[str, ...]  # the names of what may be imported from there
    hidden: tuple[str, ...]  # what paths of this machine begin with, longest first


@lru_cache(maxsize=8)
def readable(packages: tuple[str, ...] = PACKAGES) -> Readable:
    """Of the interpreter that runs this; `packages` are distributions, taken with all they require."""
    standard = {Path(sysconfig.get_path(name)) for name in ("stdlib", "platstdlib")}
    files = [entry for folder in standard for entry in folder.iterdir() if entry.name not in NOT_STANDARD]
    libraries = Path(sys.base_prefix, "lib")
    files += [*libraries.glob("*.so*"), Path("/etc/ld.so.cache"), Path("/usr/share/zoneinfo"), Path("/dev/urandom")]
    multiarch = sysconfig.get_config_var("MULTIARCH")
    files += [Path(root, multiarch) for root in ("/lib", "/usr/lib") if multiarch]
    files += [library for root in ("/lib64", "/usr/lib64") for library in Path(root).glob("*.so*")]
    places = [place for name in required(packages) for place in _places(name)]
    folders = sorted({str(place.parent) for place in places})
    listings = [*standard, *map(Path, folders)]
    hidden = {*folders, *map(str, standard), sys.prefix, sys.base_prefix, str(Path(__file__).parent)}
    longest_first = sorted(hidden - {"/", "/usr"}, key=len, reverse=True)
    modules = {inspect.getmodulename(place.name) or place.name for place in places}
    return Readable(
        tuple(dict.fromkeys([*files, *places])), tuple(listings), tuple(folders), tuple(modules), tuple(longest_first)
    )


def compile_missing(may: Readable) -> None:
    """Bytecode for the packages that have none, as where uv installed them and PYTHONDONTWRITEBYTECODE is set.

    Jailed code cannot write it, and would compile a package at every call: sympy in 2 s instead of .5. Python imports
    them once outside, where the folder is ours to write to; what fails is left as it is.
    """
    bytecode = f"__pycache__/__init__.{sys.implementation.cache_tag}.pyc"
    found = [Path(folder, name) for folder in may.folders for name in may.modules if os.access(folder, os.W_OK)]
    missing = [path.name for path in found if (path / "__init__.py").is_file() and not (path / bytecode).is_file()]
    unset = ("PYTHONDONTWRITEBYTECODE", "PYTHONPYCACHEPREFIX")
    if missing:
        environment = {name: value for name, value in os.environ.items() if name not in unset}
        program = "import sys\nfor name in sys.argv[1:]:\n    __import__(name)"
        command = [sys.executable, "-P", "-c", program, *missing]
        with suppress(subprocess.TimeoutExpired):
            subprocess.run(command, env=environment, capture_output=True, check=False, timeout=COMPILE_DEADLINE_S)


def required(packages: Iterable[str]) -> list[str]:
    """`packages` that are installed, and what they require (without extras), each once."""
    found: dict[str, None] = {}
    waiting = list(packages)
    while waiting:
        name = re.sub(r"[-_.]+", "-", waiting.pop()).lower()
        try:
            requires = metadata.requires(name) or []
        except metadata.PackageNotFoundError:
            continue
        if name not in found:
            found[name] = None
            waiting += [re.split(r"[^\w.-]", one, maxsplit=1)[0] for one in requires if "extra ==" not in one]
    return list(found)


def _places(name: str) -> set[Path]:
    """The top-level files and folders of an installed distribution, but not what installers noted about it."""
    distribution = metadata.distribution(name)
    tops = {file.parts[0] for file in distribution.files or () if file.parts[0] not in ("..", "__pycache__")}
    return {Path(str(distribution.locate_file(top))) for top in tops if not top.endswith((".dist-info", ".pth"))}
