"""Ray, as a run uses it: a cluster of its own, or one that is there."""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Iterator, Mapping
from typing import Any

import ray

from rltk import watch
from rltk.config import Cluster
from rltk.errors import ConfigError
from rltk.placement import Placement


def joins_existing(cluster: Cluster) -> bool:
    """A submitted job finds its cluster in RAY_ADDRESS; `cluster=existing` names one."""
    return cluster.name == "existing" or bool(os.environ.get("RAY_ADDRESS"))


@contextlib.contextmanager
def connect(cluster: Cluster, placement: Placement) -> Iterator[str]:
    """Ray for the time of the block; yields the session's log folder. A cluster of our own ends with the block."""
    quiet = {"log_to_driver": False, "logging_level": logging.ERROR, "configure_logging": True}
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")  # actors without a GPU keep their environment
    if joins_existing(cluster):
        address = cluster.address or os.environ.get("RAY_ADDRESS") or "auto"
        try:
            ray.init(address=address, **quiet)
        except (ConnectionError, RuntimeError, ray.exceptions.RayError) as error:
            raise ConfigError(
                f"no Ray cluster answers at {address!r} ({error}). Fix: cluster=local, or cluster.address=<host:port> "
                "(and RAY_AUTH_MODE=token where the cluster asks for a token)."
            ) from error
    else:
        # Explicit, because a token file left by another cluster would otherwise turn authentication on.
        os.environ.setdefault("RAY_AUTH_MODE", "disabled")
        ray.init(num_cpus=placement.cores, num_gpus=placement.gpus, include_dashboard=False, **quiet)
    try:
        yield str(ray._private.worker.global_worker.node.get_logs_dir_path())  # no public way to ask
    finally:
        ray.shutdown()


def node_of(actor: Any) -> str:
    """Ray's id of the node that an actor of any class is on."""
    reference = actor.__ray_call__.remote(lambda _: ray.get_runtime_context().get_node_id())
    return watch.get(reference, "tell its node", "driver", "an actor", 60)


def require_one_node(learner: str, others: Mapping[str, str]) -> None:
    """For a weight transfer within one node. `learner`: the node id of rank 0; `others`: node ids by role."""
    for role, node in others.items():
        if node != learner:
            raise ConfigError(
                f"learner rank 0 is on node {_address(learner)} and {role} on node {_address(node)}, but "
                "sync=shared_memory takes weights through one node's /dev/shm. Fix: fewer rollout.engines or "
                "learner.ranks, so that one node has room for all; or cluster=local on the larger node."
            )


def _address(node: str) -> str:
    known = {n["NodeID"]: f"{n['NodeManagerAddress']} ({n['NodeManagerHostname']}, {node[:8]})" for n in ray.nodes()}
    return known.get(node, node)
