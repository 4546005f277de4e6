"""Roles that cannot stand, or not where they must: what was started is ended, and both nodes are named."""

import os
import time
from dataclasses import replace

import psutil
import pytest
import ray

from rltk.cluster import node_of, require_one_node
from rltk.compose import load
from rltk.errors import ConfigError, DeadlineError
from rltk.model_folder import resolve_model
from rltk.placement import place
from rltk.roles import start_roles


@ray.remote(num_cpus=0)
class Somebody:
    async def nothing(self) -> None:
        """An engine's class is asynchronous, too."""


@pytest.fixture
def two_nodes(monkeypatch):
    """A cluster of two nodes, on this machine."""
    from ray.cluster_utils import Cluster

    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    cluster = Cluster()
    for name in ("first", "second"):
        cluster.add_node(num_cpus=1, resources={name: 1}, object_store_memory=100 * 2**20)
    ray.init(address=cluster.address, log_to_driver=False, logging_level="ERROR")
    yield
    ray.shutdown()
    cluster.shutdown()


def test_roles_on_two_nodes_are_refused_and_both_are_named(two_nodes):
    rank, engine, other = (Somebody.options(resources={n: 0.1}).remote() for n in ("first", "first", "second"))
    nodes = [node_of(actor) for actor in (rank, engine, other)]
    require_one_node(nodes[0], {"rollout engine 0": nodes[1]})
    with pytest.raises(ConfigError) as caught:
        require_one_node(nodes[0], {"rollout engine 0": nodes[1], "rollout engine 1": nodes[2]})
    for part in (nodes[0][:8], nodes[2][:8], "rollout engine 1", "sync=shared_memory", "rollout.engines"):
        assert part in str(caught.value)


def ours() -> list[str]:
    """Titles of the actors' processes under this one."""
    titles = [" ".join(p.cmdline()) for p in psutil.Process(os.getpid()).children(recursive=True) if p.is_running()]
    return [title for title in titles if title.startswith("ray::") and ("Engine" in title or "Learner" in title)]


def test_a_start_that_fails_leaves_no_actor_behind(ray_cluster):
    """In the order of roles that share a GPU, where one is waited for before the others exist."""
    config = resolve_model(load(["cluster.device=cpu", "rollout.threads=1", "learner.threads=1"]))
    config = replace(config, deadlines=replace(config.deadlines, start=8.0))
    placement = replace(place(config), gpu_shared=True, engine_cpus=0.1, rank_cpus=0.1)
    said = []
    with pytest.raises((DeadlineError, ray.exceptions.RayError)):
        start_roles(replace(config, model=replace(config.model, path="/no/such/model")), placement, say=said.append)
    assert said == ["place the learner ranks", "start rollout engine 0"]
    until = time.monotonic() + 60
    while ours() and time.monotonic() < until:
        time.sleep(0.2)
    assert ours() == []
