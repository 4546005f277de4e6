"""Shared by unit tests: the default run's configuration; and one thread for torch, whose tensors are tiny here: two
threads on a busy machine cost fifty times as much as one.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
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
