"""What tests of `rltk.checks` ask."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from rltk.checks import check
from rltk.config import Config
from rltk.errors import ConfigError


def see_gpus(monkeypatch, count: int) -> None:
    for module in ("rltk.devices", "rltk.placement", "rltk.checks"):
        monkeypatch.setattr(f"{module}.gpus", lambda: count)


def changed(config: Config, settings: dict[str, Any]) -> Config:
    for key, value in settings.items():
        config = _set(config, key, value)
    return config


def _set(node: Any, key: str, value: Any) -> Any:
    name, _, rest = key.partition(".")
    return replace(node, **{name: _set(getattr(node, name), rest, value) if rest else value})


def refusal(config: Config, settings: dict[str, Any] | None = None) -> str:
    with pytest.raises(ConfigError) as caught:
        check(changed(config, settings or {}))
    return str(caught.value)
