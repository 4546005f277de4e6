"""Shared by all tests: no property is given a time. By integration tests: one local Ray cluster a module."""

import os

import pytest
from hypothesis import settings

settings.register_profile("rltk", deadline=None)
settings.load_profile("rltk")


@pytest.fixture(scope="module")
def ray_cluster():
    """A cluster of our own, ended with the module."""
    import ray

    os.environ.setdefault("RAY_AUTH_MODE", "disabled")
    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False, logging_level="ERROR")
    yield
    ray.shutdown()
