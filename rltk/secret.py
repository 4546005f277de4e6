"""Secrets come from the environment only: the configuration is printed, hashed and uploaded."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from typing import Any

from rltk.errors import ConfigError

SECRET_KEY = re.compile(
    r"(^|_)(api_?key|secret|password|passwd|credentials?|(access|auth|api|hf|bearer)_?token)$|^token$"
)
SECRET_VALUE = re.compile(
    r"hf_[A-Za-z0-9]{30,}|wandb_v\d_\w{20,}|sk-[\w-]{20,}|gh[oprsu]_[A-Za-z0-9]{30,}|github_pat_\w{20,}"
    r"|xox[abprs]-[\w-]{10,}|AKIA[0-9A-Z]{16}|AIza[\w-]{35}|[0-9a-f]{40}$|-----BEGIN [A-Z ]*PRIVATE KEY"
)
FINGERPRINT_KEY = re.compile(r"(revision|commit|sha\d*|hash|digest)$")  # 40 hex digits here are no W&B key


def refuse_secrets(value: Any, where: str = "") -> None:
    """ConfigError for a value that looks like a secret by key, form or environment. Never shows the value."""
    if isinstance(value, Mapping):
        for key, item in value.items():
            refuse_secrets(item, f"{where}.{key}" if where else str(key))
    elif isinstance(value, list):
        for item in value:
            refuse_secrets(item, where)
    elif isinstance(value, str) and value and _secret(where.rsplit(".", 1)[-1].lower(), value):
        raise ConfigError(
            f"{where} holds what looks like a secret (not shown): secrets come from the environment, as WANDB_API_KEY "
            f"or HF_TOKEN do; remove {where}, and renew the secret if it was stored anywhere"
        )


def _secret(key: str, value: str) -> bool:
    if FINGERPRINT_KEY.search(key):
        return False
    if SECRET_KEY.search(key) or SECRET_VALUE.match(value):
        return True
    known = [item for name, item in os.environ.items() if re.search(r"(KEY|TOKEN|SECRET|PASSWORD)$", name)]
    return any(len(item) >= 16 and item in value for item in known)
