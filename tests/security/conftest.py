"""Shared: a place for attacks that every user may enter."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.security.arena import arena


@pytest.fixture(scope="session")
def folder() -> Iterator[Path]:
    with arena() as made:
        yield made
