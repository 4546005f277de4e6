"""What this machine has, asked without torch: CPU cores and GPUs."""

from __future__ import annotations

import os
import re
from pathlib import Path

from rltk.config import Cluster


def cores() -> int:
    """CPU cores this process may use: the affinity mask, and the container's quota where it is lower."""
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    try:
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()
    except (OSError, ValueError):
        return allowed
    return allowed if quota == "max" else max(1, min(allowed, int(quota) // int(period)))


def gpus(devices: Path = Path("/dev")) -> int:
    """NVIDIA GPUs this process may use: the device files, less what CUDA_VISIBLE_DEVICES hides."""
    present = sum(1 for entry in devices.glob("nvidia*") if re.fullmatch(r"nvidia\d+", entry.name))
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is None:
        return present
    listed = [part.strip() for part in visible.split(",")]
    shown = next((i for i, part in enumerate(listed) if part in ("", "-1")), len(listed))  # CUDA stops there
    return min(present, shown)


def device(cluster: Cluster) -> str:
    """`cpu` or `gpu`: what the run's roles compute on."""
    if cluster.device == "auto":
        return "gpu" if gpus() else "cpu"
    return cluster.device
