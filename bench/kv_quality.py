"""`python -m bench.kv_quality`: what compressed caches cost a real model, SmolLM2-135M, in retrieval and perplexity.

    needles         a 7-digit number somewhere in a story of 1K to 8K tokens; right if every digit is the likeliest
    continuations   the perplexity of the 48 tokens after the first of pieces of running text

for full, dapq, snapkv, h2o and streaming at 3, 6, 12, 25 and 50 % of the prompt. The tokens are forced through the
plugin's policies and decode kernel inside a transformers model (bench/kv_model.py), which gives what greedy decoding in
the engine gives (tests/integration/test_kv_quality.py holds the two together). Intervals are 95 %: Wilson's for shares,
a bootstrap over pieces for perplexities. Writes docs/results/kv_quality.json and its heat maps.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from bench.kv_heatmaps import draw
from bench.kv_model import Prompts, StudyModel
from bench.kv_texts import Sample, continuations, needles
from rltk.compose import load
from rltk.files import write_json
from rltk.manifest import versions
from rltk.model_folder import resolve_model
from rltk.rollout.kv.options import KVOptions
from rltk.rollout.kv.policies.policy import build_policy

POLICIES = ("dapq", "snapkv", "h2o", "streaming")
SHARES = (0.03, 0.06, 0.12, 0.25, 0.5)
HEADS = ("per_kv_head", "shared")  # the papers' choice first; the toolkit's default second
SINKS, BLOCK = 4, 16
RESULTS = Path("docs/results")


@dataclass(frozen=True)
class Size:
    lengths: tuple[int, ...]  # of needle prompts
    depths: int
    each: int  # prompts a length and depth
    contexts: tuple[int, ...]  # of continuations
    pieces: int
    scored: int  # tokens of a continuation after its first


# The model's context is 8 192 positions, of which the answer and dapq's pseudo tokens take some.
FULL = Size((1024, 2048, 4096, 6144, 8064), 11, 4, (1024, 4096), 64, 48)
SMALL = Size((512, 1024), 3, 2, (512,), 6, 12)


@dataclass(frozen=True)
class Cell:
    """One cache. share 1: the full one."""

    policy: str
    share: float
    heads: str

    def options(self, length: int) -> KVOptions:
        if self.policy == "full":
            return KVOptions(sinks=0)
        return KVOptions(self.policy, budget=math.floor(self.share * length), heads=self.heads, sinks=SINKS)

    def fits(self, length: int) -> bool:
        """The engine refuses budgets below the sinks and one block."""
        return self.policy == "full" or math.floor(self.share * length) >= SINKS + BLOCK

    @property
    def name(self) -> str:
        if self.policy == "full":
            return "full"
        own = "" if self.policy == "streaming" else f"/{self.heads}"  # which keeps the same tokens for every head
        return f"{self.policy}{own}@{self.share:.0%}"


def cells(policies: Sequence[str], heads: Sequence[str]) -> list[Cell]:
    found = [Cell("full", 1.0, "per_kv_head")]
    for policy in policies:
        kinds = heads[:1] if policy == "streaming" else heads
        found += [Cell(policy, share, kind) for kind in kinds for share in SHARES]
    return found


def study(model: StudyModel, size: Size, every: list[Cell]) -> tuple[dict[str, list], dict[str, list]]:
    """By cell: [length, depth, right, digits right] of every needle; [context, source, mean NLL] of every piece."""
    found: dict[str, list] = {cell.name: [] for cell in every}
    read: dict[str, list] = {cell.name: [] for cell in every}
    for length in size.lengths:
        samples = needles(model.tokenizer, length, size.depths, size.each)
        for cell, logprobs in _over_cells(model, samples, every, f"needles in {length} tokens"):
            answers = torch.tensor([sample.answer for sample in samples], device=logprobs.device)
            likeliest = logprobs.argmax(-1) == answers
            for sample, digits in zip(samples, likeliest.tolist(), strict=True):
                found[cell.name].append([length, sample.depth, all(digits), sum(digits)])
    for length in size.contexts:
        samples = continuations(model.tokenizer, length, size.scored + 1, size.pieces)
        for cell, logprobs in _over_cells(model, samples, every, f"continuations of {length} tokens"):
            answers = torch.tensor([sample.answer for sample in samples], device=logprobs.device)
            # The first token is the prefill's, by the whole cache: it says nothing about a compressed one.
            losses = -logprobs.gather(2, answers[..., None])[:, 1:, 0].mean(1)
            for sample, loss in zip(samples, losses.tolist(), strict=True):
                read[cell.name].append([length, sample.source, loss])
    return found, read


def _over_cells(
    model: StudyModel, samples: list[Sample], every: list[Cell], what: str
) -> Iterator[tuple[Cell, torch.Tensor]]:
    start = time.perf_counter()
    prompts: Prompts = model.prefill([sample.prompt for sample in samples])
    prefilled = time.perf_counter()
    for cell in every:
        if cell.fits(prompts.length):
            answers = [sample.answer for sample in samples]
            yield cell, model.continued(prompts, cell.options(prompts.length), answers)
    seconds = time.perf_counter() - start
    print(f"{len(samples)} {what}: {prefilled - start:.0f} s of prefill, {seconds:.0f} s in all", flush=True)


def wilson(right: int, count: int, z: float = 1.96) -> list[float]:
    """[share, low, high] of a binomial share."""
    if count == 0:
        return [math.nan] * 3
    share = right / count
    middle = (share + z * z / (2 * count)) / (1 + z * z / count)
    half = z / (1 + z * z / count) * math.sqrt(share * (1 - share) / count + z * z / (4 * count * count))
    return [share, max(0.0, middle - half), min(1.0, middle + half)]


def bootstrap(losses: Sequence[float], base: Sequence[float] | None = None, draws: int = 2000) -> list[float]:
    """[exp(mean), low, high] over pieces; with `base`, of the ratio to it, piece by piece."""
    values = np.asarray(losses) - (0.0 if base is None else np.asarray(base))
    means = values[np.random.default_rng(0).integers(0, len(values), (draws, len(values)))].mean(1)
    low, high = np.quantile(means, [0.025, 0.975])
    return [float(np.exp(each)) for each in (values.mean(), low, high)]


def figures(found: dict[str, list], read: dict[str, list], every: list[Cell], contexts: Sequence[int]) -> dict:
    """Per cell: retrieval over all needles and by length; perplexity, and its ratio to full's, by context."""
    result: dict[str, Any] = {}
    for cell in every:
        rows, losses = found[cell.name], read[cell.name]
        by_length = {length: [row[2] for row in rows if row[0] == length] for length in sorted({r[0] for r in rows})}
        entry: dict[str, Any] = {"policy": cell.policy, "share": cell.share, "heads": cell.heads}
        entry["retrieval"] = wilson(sum(row[2] for row in rows), len(rows)) if rows else None
        entry["digits"] = sum(row[3] for row in rows) / (7 * len(rows)) if rows else None
        entry["retrieval_by_length"] = {length: wilson(sum(each), len(each)) for length, each in by_length.items()}
        for context in contexts:
            here = [row[2] for row in losses if row[0] == context]
            full = [row[2] for row in read["full"] if row[0] == context]
            if here:
                entry[f"perplexity_{context}"] = bootstrap(here)
                entry[f"perplexity_over_full_{context}"] = bootstrap(here, full)
        result[cell.name] = entry
    return result


def table(result: dict[str, Any], contexts: Sequence[int]) -> str:
    heads = ["cache", "needles found", *(f"perplexity after {context}" for context in contexts)]
    lines = [" | ".join(heads), " | ".join("---" for _ in heads)]
    for name, entry in result.items():
        row = [name, _interval(entry["retrieval"], 100, "%.0f %% (%.0f-%.0f)")]
        row += [_interval(entry.get(f"perplexity_{context}"), 1, "%.1f (%.1f-%.1f)") for context in contexts]
        lines.append(" | ".join(row))
    return "\n".join(f"| {line} |" for line in lines)


def _interval(values: list[float] | None, scale: float, form: str) -> str:
    return "" if values is None else form % tuple(scale * value for value in values)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--small", action="store_true", help="a few short prompts, for a CPU")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--kernel", choices=("triton", "reference"), help="default: triton on a GPU")
    parser.add_argument("--heads", nargs="+", choices=HEADS, default=list(HEADS))
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of kv_quality.json and the heat maps")
    parser.add_argument("--threads", type=int, help="CPU threads; 1 on a busy machine")
    asked = parser.parse_args()
    triton = asked.kernel == "triton" or (asked.kernel is None and asked.device == "cuda")
    if asked.threads:
        torch.set_num_threads(asked.threads)
    start, size = time.perf_counter(), SMALL if asked.small else FULL
    os.environ.setdefault("TRITON_F32_DEFAULT", "ieee")
    folder = resolve_model(load(["model=smollm2"])).model.path
    model = StudyModel(folder, {name: build_policy(name, {}) for name in POLICIES}, asked.device, triton)
    every = cells(POLICIES, asked.heads)
    found, read = study(model, size, every)
    result = figures(found, read, every, size.contexts)
    print(table(result, size.contexts))
    record = {
        "bench": "kv_quality",
        "hardware": torch.cuda.get_device_name()
        if asked.device == "cuda"
        else f"{os.cpu_count()} x {platform.machine()}",
        "versions": versions(),
        "command": " ".join(["python -m bench.kv_quality", *sys.argv[1:]]),
        "model": "smollm2",
        "kernel": "triton" if triton else "reference",
        "seconds": time.perf_counter() - start,
        "needles": {"lengths": size.lengths, "depths": size.depths, "each": size.each},
        "continuations": {"contexts": size.contexts, "pieces": size.pieces, "scored_tokens": size.scored},
        "figures": result,
    }
    write_json(asked.out / "kv_quality.json", record | {"rows": {"needles": found, "continuations": read}})
    for heads in asked.heads:
        draw(asked.out / f"kv_quality_{heads}.png", found, result, every, heads, size.contexts)
    summary = {name: entry["retrieval"][0] for name, entry in result.items() if entry["retrieval"]}
    print(json.dumps(record | {"figures": summary}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
