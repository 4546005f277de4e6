"""The process of an actor, and its end.

ray.kill asks the process to end, and forces it only if the request is left unanswered for 5 s. Where the request cannot
even be delivered, as to a process that has stood still for half a minute, it does nothing and says nothing (ray 2.60,
NodeManager::HandleKillLocalActor). The signal is sent on the process's own node instead.
"""

from __future__ import annotations

import contextlib
import os
from dataclasses import dataclass
from typing import Any

import psutil
import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy


@dataclass(frozen=True)
class Process:
    """node: Ray's id. started: seconds since the epoch, as a process id may be given again."""

    node: str
    pid: int
    started: float


def own(_: Any = None) -> Process:
    """Of whoever calls it."""
    started = psutil.Process().create_time()
    return Process(ray.get_runtime_context().get_node_id(), os.getpid(), started)


def process_of(actor: Any) -> Any:
    """A reference to the `Process` of an actor of any class."""
    return actor.__ray_call__.remote(own)


async def end(process: Process) -> bool:
    """SIGKILL. False: it had ended before. Raises RayError if nobody on its node can be asked."""
    there = NodeAffinitySchedulingStrategy(process.node, soft=False)
    return await ray.remote(_end).options(num_cpus=0, max_retries=0, scheduling_strategy=there).remote(process)


def _end(process: Process) -> bool:
    with contextlib.suppress(psutil.NoSuchProcess):
        found = psutil.Process(process.pid)
        if found.create_time() == process.started and found.status() != psutil.STATUS_ZOMBIE:
            found.kill()
            return True
    return False
