"""Supervised warm start: build the project's small model, or take one, and teach it sound solutions and shortcuts.

    python -m rltk.sft [--config conf/sft.yaml] [key=value ...]      e.g. out=my_model seed=1 steps=100 model.hidden=96

One process on a CPU or a GPU (bfloat16 autocast there). The same command and seed give the same weights on a CPU; on a
GPU up to the order of its sums, so two runs agree in their measured accuracies, not in every bit.
"""

from __future__ import annotations

import argparse
import math
import sys
import time
from collections.abc import Iterable, Iterator
from pathlib import Path

import torch
import yaml
from transformers import AutoConfig, AutoModelForCausalLM

from rltk.config import Task as TaskConfig
from rltk.errors import ConfigError
from rltk.models.build import build_model, build_tokenizer, save
from rltk.rollout.tokens import load_tokenizer
from rltk.sft_data import WITH_TOOLS, Examples, corpus, draw_examples, pack
from rltk.sft_measure import measure
from rltk.tasks import Task, build_task

CONF = Path(__file__).parent / "conf"
MicroBatch = dict[str, torch.Tensor]  # inputs of the model, and labels [B, T] (-100: not learnt)


def train(
    model,
    batches: Iterable[list[MicroBatch]],
    steps: int,
    lr: float,
    warmup: int = 0,
    weight_decay: float = 0.0,
    max_grad_norm: float = 1.0,
    log=print,
) -> None:
    """Minimise the mean cross-entropy of the labelled tokens with AdamW: one optimizer step a batch, `steps` in all.

    A micro-batch holds `labels` and whatever else the model's forward takes. The learning rate (of one step) rises
    linearly over `warmup` steps, then falls to 0 along a cosine. Works for any causal LM of transformers.
    """
    device = next(model.parameters()).device
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=lr, betas=(0.9, 0.98), weight_decay=weight_decay, fused=device.type == "cuda"
    )
    model.train()
    began = time.monotonic()
    for step, micro_batches in zip(range(steps), batches, strict=False):
        scale = min(1.0, (step + 1) / max(1, warmup)) * 0.5 * (1 + math.cos(math.pi * step / steps))
        for group in optimizer.param_groups:
            group["lr"] = lr * scale
        tokens = sum((batch["labels"][:, 1:] != -100).sum() for batch in micro_batches)
        mean_loss = torch.zeros((), device=device)
        for batch in micro_batches:
            loss = summed_loss(model, batch)
            (loss / tokens).backward()
            mean_loss += loss.detach() / tokens
        torch.nn.utils.clip_grad_norm_(model.parameters(), max_grad_norm)
        optimizer.step()
        optimizer.zero_grad()
        if (step + 1) % max(1, steps // 20) == 0:
            log(f"step {step + 1}/{steps}  loss {mean_loss.item():.4f}  {time.monotonic() - began:.0f} s")


def summed_loss(model, batch: MicroBatch) -> torch.Tensor:
    """Cross-entropy summed over the labelled tokens; the label at t + 1 belongs to the logits at t."""
    inputs = {key: value for key, value in batch.items() if key != "labels"}
    labels = batch["labels"][:, 1:].flatten()
    with torch.autocast(labels.device.type, torch.bfloat16, enabled=labels.device.type == "cuda"):
        logits = model(**inputs, use_cache=False).logits[:, :-1].flatten(0, 1)
    return torch.nn.functional.cross_entropy(logits.float(), labels, ignore_index=-100, reduction="sum")


def mixed_batches(
    examples: list[Examples], sizes: list[int], width: int, seed: int, device
) -> Iterator[list[MicroBatch]]:
    """Endless batches of `sizes[i]` examples of `examples[i]`, drawn with replacement, packed into rows of `width`."""
    generator = torch.Generator().manual_seed(seed)
    while True:
        parts = [(e, torch.randint(0, len(e), (n,), generator=generator)) for e, n in zip(examples, sizes, strict=True)]
        yield [pack(parts, width, device)]


def task_config(name: str) -> TaskConfig:
    """The task of conf/task/<name>.yaml as a run would have it, read without Hydra."""
    options = yaml.safe_load((CONF / "task" / f"{name}.yaml").read_text())
    known = {key: options.pop(key) for key in ("name", "target", "max_prompt_tokens", "max_response_tokens")}
    return TaskConfig(**known, options=options)


def load_config(path: Path, overrides: list[str]) -> dict:
    """The YAML file with `a.b=value` overrides applied; only keys that are there may be set."""
    config = yaml.safe_load(path.read_text())
    for override in overrides:
        key, equals, value = override.partition("=")
        *parents, last = key.split(".")
        place = config
        for parent in parents:
            place = _child(place, parent, key)
        _child(place, last, key)
        if not equals:
            raise ConfigError(f"{override!r} is not of the form key=value")
        known = _key(place, last)
        place[known] = _value(key, value, place[known])
    return config


def _value(key: str, text: str, before: object) -> object:
    """`text` as YAML; where a number stood, a number: YAML reads 1e-4, which has no point, as a word."""
    value = yaml.safe_load(text)
    if not isinstance(value, str) or isinstance(before, bool) or not isinstance(before, int | float):
        return value
    try:
        return float(value)
    except ValueError:
        raise ConfigError(f"{key} = {value!r} must be a number, as {before}") from None


def _key(place: dict, name: str):
    return next((k for k in place if str(k) == name), None)


def _child(place, name: str, key: str):
    if not isinstance(place, dict) or _key(place, name) is None:
        known = ", ".join(map(str, place)) if isinstance(place, dict) else "no keys"
        raise ConfigError(f"unknown key {key!r}: {name!r} is not one of {known}")
    return place[_key(place, name)]


def check_init(init: str | None) -> None:
    """Raises ConfigError for a model to start from whose attention is computed otherwise here than it should be."""
    if init is None:
        return
    cap = getattr(AutoConfig.from_pretrained(init).get_text_config(), "attn_logit_softcapping", None)
    if cap is not None:
        raise ConfigError(
            f"init = {init!r}: its config.json has attn_logit_softcapping = {cap:g}, and the attention of this warm "
            "start has no such cap, so it would teach another model; start from a model without it"
        )


def start_tokenizer(config: dict, tasks: list[Task]):
    """That of the folder `init`, or one trained on the tasks."""
    if config["init"] is None:
        return build_tokenizer(corpus(tasks), config["model"]["vocabulary"])
    tokenizer = load_tokenizer(config["init"])
    for key in ("is_local", "local_files_only"):  # how it was loaded; it would be saved as a part of it
        tokenizer.init_kwargs.pop(key, None)
    if tokenizer.pad_token_id is None:  # as many come; it only fills rows
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def start_model(config: dict, tokenizer):
    """The weights of the folder `init`, or random ones in the shape of `model`; fp32."""
    if config["init"] is None:
        shape = {key: value for key, value in config["model"].items() if key != "vocabulary"}
        return build_model(tokenizer, **shape)
    return AutoModelForCausalLM.from_pretrained(config["init"], dtype=torch.float32)


def run(config: dict) -> None:
    began = time.monotonic()
    device = config["device"]
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cuda" and not torch.cuda.is_available():
        raise ConfigError("device=cuda, but torch sees no GPU here; use device=cpu or device=auto")
    if config["threads"]:
        torch.set_num_threads(config["threads"])
    print(yaml.safe_dump(config, sort_keys=False), flush=True)

    check_init(config["init"])
    configs = {name: task_config(name) for name in config["tasks"]}
    tasks = {name: build_task(task) for name, task in configs.items()}
    tokenizer = start_tokenizer(config, list(tasks.values()))
    examples = [
        draw_examples(tokenizer, tasks[name], part["levels"], part["examples"], config["seed"], config["processes"])
        for name, part in config["tasks"].items()
    ]
    print(f"{sum(map(len, examples))} examples in {time.monotonic() - began:.0f} s", flush=True)

    torch.manual_seed(config["seed"])
    model = start_model(config, tokenizer).to(device)
    print(f"{sum(p.numel() for p in model.parameters()):,} parameters on {device}", flush=True)
    sizes = [part["batch"] for part in config["tasks"].values()]
    batches = mixed_batches(examples, sizes, config["tokens_per_row"], config["seed"], device)
    options = {key: config[key] for key in ("steps", "lr", "warmup", "weight_decay", "max_grad_norm")}
    train(model, batches, **options, log=lambda line: print(line, flush=True))
    save(model, tokenizer, config["out"])

    model.float()  # the weights as written, bfloat16, computed with in float32
    for name, task in tasks.items():
        for samples in (config["held_out"]["samples"], 0):
            most = configs[name].max_response_tokens
            tools = task.name in WITH_TOOLS
            result = measure(model, tokenizer, task, config["held_out"]["problems"], samples, most, tools)
            print(f"held-out {name} {f'avg@{samples}' if samples else 'greedy'} {result}", flush=True)
    print(f"wrote {config['out']} after {time.monotonic() - began:.0f} s", flush=True)


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m rltk.sft", description="Train the project's small model by supervised learning"
    )
    parser.add_argument("--config", type=Path, default=CONF / "sft.yaml")
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    arguments = parser.parse_args()
    try:
        run(load_config(arguments.config, arguments.overrides))
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main())
