"""`python -m rltk.lab algorithm=ctpo lab.staleness=4`: see USAGE."""

from __future__ import annotations

import json
import sys
import time
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import yaml

from rltk.checks import check
from rltk.cli import run_entry, wants_help
from rltk.compose import load
from rltk.config import Config
from rltk.convert import convert
from rltk.errors import ConfigError
from rltk.files import without_nan, write_json
from rltk.model_folder import resolve_model
from rltk.tasks import build_task
from rltk.value_checks import get

USAGE = """usage: python -m rltk.lab [algorithm=ctpo] [<key>=<value> ...] [lab.<dial>=<value> ...]

Trains in one process: no Ray, no vLLM, no DeepSpeed. The keys are those of `python -m rltk.train` (algorithm, task,
correction, ratio, batch, learner.lr, steps, evaluation ...), with a smaller batch: 16 prompts x 8 samples, 25 steps.

  lab.staleness=0    weight versions between the sampler and the learner
  lab.seeds=null     a list of seeds, as in [0,1,2]: a run each, side by side (null: one, with seed=)
  lab.kv_bits=16     bits that the sampler's KV cache keeps; under 16 it samples from a quantised cache
                     (kv=longflow kv.budget=0.2 ... as in rltk.train: it samples from a compressed one)
  lab.noise_every=0  measure the gradient's noise every so many steps: |gA - gB|^2 / |gA + gB|^2 of a minibatch's halves
  lab.model=null     a model folder of the same architecture (null: what model= says)
  lab.threads=1      CPU threads
  lab.out=null       a file for every step's figures (JSON)

Prints a line a step and, last, one JSON line."""
KNOWN = {
    "learner.schedule": "constant", "learner.warmup_steps": 0, "learner.dtype": "float32", "rollout.dtype": "float32",
    "reward.path": None, "debug.permute_rewards": False, "pipeline.max_staleness": 0,
}  # fmt: skip
DEFAULTS = ("batch.prompts=16", "steps=25", "evaluation.every=0", "evaluation.problems=64")


@dataclass(frozen=True)
class Dials:
    staleness: int = 0
    seeds: list[int] = field(default_factory=list)  # empty: the configuration's own
    kv_bits: int = 16
    noise_every: int = 0
    model: str | None = None
    threads: int = 1
    out: str | None = None


def main(argv: list[str]) -> int:
    if wants_help(argv):
        print(USAGE)
        return 0
    dials = _dials([a.removeprefix("lab.") for a in argv if a.startswith("lab.")])
    argv = [
        *DEFAULTS,
        *(a for a in argv if not a.startswith("lab.")),
        *([f"model={dials.model}"] if dials.model else []),
    ]
    config = resolve_model(load(argv))
    for warning in check(config, writes=False):
        print(f"rltk: warning: {warning}", file=sys.stderr)
    _refuse_unknown(config)
    dials = replace(dials, seeds=dials.seeds or [config.seed])
    started = time.perf_counter()
    rows = _run(config, dials)
    figures: dict[str, Any] = {
        "seeds": dials.seeds, "staleness": dials.staleness, "seconds": round(time.perf_counter() - started, 1),
        "accuracy": [row["accuracy"] for row in rows[-1]], "initial_accuracy": [row["accuracy"] for row in rows[0]],
        "greedy": [row["greedy"] for row in rows[-1]], "flawed": [row["flawed"] for row in rows[-1]],
    }  # fmt: skip
    if dials.out:
        command = f"python -m rltk.lab {' '.join(argv)}"
        write_json(Path(dials.out), without_nan({"command": command, **figures, "rows": rows}))
    print(json.dumps(without_nan({"lab": config.algorithm.name, **figures})))
    return 0


def _refuse_unknown(config: Config) -> None:
    """What `rltk.train` would do and the lab would pass over in silence."""
    for key, known in KNOWN.items():
        if (value := get(config, key)) != known:
            raise ConfigError(
                f"{key} = {value!r}: the lab knows only {known!r}. Fix: leave it, or python -m rltk.train"
            )


def _dials(given: list[str]) -> Dials:
    values = {}
    for argument in given:
        key, _, value = argument.partition("=")
        values[key] = yaml.safe_load(value)
    seeds = values.pop("seeds", None)
    seeds = [] if seeds is None else [seeds] if isinstance(seeds, int) else seeds
    if not isinstance(seeds, list) or not all(type(s) is int for s in seeds):
        raise ConfigError(f"lab.seeds={seeds!r}: a list of whole numbers, as in lab.seeds=[0,1,2]")
    known = {f.name: f for f in fields(Dials) if f.name != "seeds"}
    dials = convert(Dials, {key: value for key, value in values.items() if key in known} or {}, "lab")
    if unknown := [key for key in values if key not in known]:
        raise ConfigError(f"unknown key lab.{unknown[0]}. Keys there: {', '.join([*known, 'seeds'])}")
    if dials.staleness < 0 or not 2 <= dials.kv_bits <= 16 or dials.threads < 1 or dials.noise_every < 0:
        raise ConfigError(f"{dials}: staleness and noise_every are at least 0, kv_bits 2 to 16, threads at least 1")
    return replace(dials, seeds=seeds)


def _run(config: Config, dials: Dials) -> list[list[dict[str, Any]]]:
    import torch

    from rltk.devices import gpus
    from rltk.lab.arm import Arm, Settings
    from rltk.lab.loop import Lab

    torch.set_num_threads(dials.threads)
    learner, algorithm = config.learner, config.algorithm
    device = config.cluster.device if config.cluster.device != "auto" else ("gpu" if gpus() else "cpu")
    settings = Settings(
        model=config.model.path, steps=config.steps, minibatches=algorithm.minibatches, prompts=config.batch.prompts,
        samples=config.batch.samples, lr=learner.lr, beta1=learner.beta1, beta2=learner.beta2, eps=learner.eps,
        weight_decay=learner.weight_decay, max_grad_norm=learner.max_grad_norm,
        temperature=config.rollout.temperature, kv=config.kv, kv_bits=dials.kv_bits,
        problems=config.evaluation.problems, eval_samples=config.evaluation.samples,
        evaluate_every=config.evaluation.every, noise_every=dials.noise_every, device=device,
    )  # fmt: skip
    arms = [
        Arm(
            f"{algorithm.name}-s{seed}", algorithm.path or algorithm.name, dict(algorithm.options), config.correction,
            dict(config.correction_options), config.ratio.reference, dials.staleness, seed,
        )
        for seed in dials.seeds
    ]  # fmt: skip
    try:
        lab = Lab(
            build_task(config.task), arms, settings, config.task.max_prompt_tokens, config.task.max_response_tokens
        )
    except ValueError as error:
        raise ConfigError(f"algorithm={algorithm.name}: {error}") from error
    rows = []
    for row in lab.run():
        rows.append(row)
        print(line(row), flush=True)
    return rows


def line(rows: list[dict[str, Any]]) -> str:
    """One step of all runs, their mean."""

    def mean(name: str) -> str:
        values = [row[name] for row in rows if row.get(name) is not None]
        return f"{name} {sum(values) / len(values):.3f}" if values else ""

    names = (
        "accuracy",
        "greedy",
        "flawed",
        "reward",
        "length",
        "entropy",
        "loss",
        "grad_norm",
        "clip/share",
        "kl/sampler",
        "mismatch/tail_per_1k",
    )
    return f"{rows[0]['step']:4}  " + "  ".join(text for text in map(mean, names) if text)


if __name__ == "__main__":
    run_entry(main)
