"""Shared by unit tests: the default run's configuration; and one thread for torch, whose tensors are tiny here: two
threads on a busy machine cost fifty times as much as one; and Triton's library interpreted, for test_kernels.py.
"""

from __future__ import annotations

import os
from dataclasses import replace
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
