"""Shared by unit tests: the default run's configuration; and one thread for torch, whose tensors are tiny here: two
threads on a busy machine cost fifty times as much as one; and Triton interpreted, for the tests of the kernels.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable, Iterator
from dataclasses import replace
from types import ModuleType
from unittest import mock

import pytest

with mock.patch.dict(os.environ, TRITON_INTERPRET="1"):  # read where a function is defined
    import triton.language  # noqa: F401
import torch

from rltk.compose import load
from rltk.config import Config
from rltk.model_folder import resolve_model
from tests.unit.checking import see_gpus

torch.set_num_threads(1)


@pytest.fixture(scope="module")
def loaded() -> Config:
    return load([])


@pytest.fixture
def base(loaded, tmp_path, monkeypatch) -> Config:
    """The default run, in a folder of its own, on a machine without a GPU, an address or a key."""
    for name in ("CUDA_VISIBLE_DEVICES", "RAY_ADDRESS", "WANDB_API_KEY"):
        monkeypatch.delenv(name, raising=False)
    see_gpus(monkeypatch, 0)
    return replace(resolve_model(loaded), output=str(tmp_path / "runs"))


@pytest.fixture(scope="module")
def interpreted() -> Iterator[Callable[[str], ModuleType]]:
    """A kernel module by name, in a copy that runs on the CPU: Triton decides it where a kernel is defined."""

    def module(name: str) -> ModuleType:
        spec = importlib.util.find_spec(f"rltk.kernels.{name}")
        assert spec is not None and spec.loader is not None
        copy = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(copy)
        return copy

    with mock.patch.dict(os.environ, TRITON_INTERPRET="1"):
        yield module
