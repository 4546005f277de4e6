"""`python -m bench.kv_quality`: what compressed caches cost a real model, SmolLM2-135M, in retrieval and perplexity.

    needles         a 7-digit number somewhere in a story of up to 8K tokens; right if every digit is the likeliest
    continuations   the perplexity of the 48 tokens after the first of pieces of running text

for full, dapq, snapkv, h2o and streaming at 3, 6, 12, 25 and 50 % of the prompt. The tokens are forced through the
plugin's policies and decode kernel inside a transformers model (bench/kv_model.py), which gives what greedy decoding in
the engine gives (tests/integration/test_kv_quality.py holds the two together). Intervals are 95 %: Wilson's for shares,
a bootstrap over pieces for perplexities. Writes docs/results/kv_quality.json, its rows and its heat maps after every
part; `--resume` goes on where a run was cut.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from bench.kv_heatmaps import draw
from bench.kv_model import StudyModel
from bench.kv_quality_figures import figures, table
from bench.kv_texts import Sample, continuations, needles
from rltk.compose import load
from rltk.files import write_json, write_text
from rltk.manifest import versions
from rltk.model_folder import resolve_model
from rltk.rollout.kv.options import KVOptions
from rltk.rollout.kv.policies.policy import build_policy

POLICIES = ("dapq", "snapkv", "h2o", "streaming")
SHARES = (0.03, 0.06, 0.12, 0.25, 0.5)
HEADS = ("per_kv_head", "shared")  # the papers' choice first; the toolkit's default second
SINKS, BLOCK = 4, 16
RESULTS, ROWS = Path("docs/results"), "kv_quality_rows.json"
HEAD = """# Needles and perplexity, cache by cache

Made by `bench.kv_quality` (see kv_quality.md); {done} of {all} parts done. Needles found in %, with 95 % intervals.

"""


@dataclass(frozen=True)
class Size:
    lengths: tuple[int, ...]  # of needle prompts
    depths: int
    each: int  # prompts a length and depth
    contexts: tuple[int, ...]  # of continuations
    pieces: int
    scored: int  # tokens of a continuation after its first
    rounds: int = 1  # that prompts are done in: each has every depth (or both sources), and is written when done


# The model's context is 8 192 positions, of which the answer and dapq's pseudo tokens take some.
SIZES = {
    "full": Size((1024, 2048, 4096, 6144, 8064), 11, 4, (1024, 4096), 64, 48),
    "cpu": Size((512, 1024, 2048), 11, 4, (1024,), 64, 48, rounds=4),
    "small": Size((512, 1024), 3, 2, (512,), 6, 12),
}


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


@dataclass(frozen=True)
class Part:
    """One round of needles of one length, or of continuations after one context."""

    kind: str
    length: int
    round: int

    @property
    def name(self) -> str:
        return f"{self.kind} {self.length} {self.round}"


@dataclass
class Rows:
    """What was seen, by cell: needles [length, depth, right, digits right], continuations [context, source, mean NLL].

    done: seconds of the parts that are in.
    """

    needles: dict[str, list]
    continuations: dict[str, list]
    done: dict[str, float] = field(default_factory=dict)

    @classmethod
    def of(cls, every: Sequence[Cell]) -> Rows:
        return cls({cell.name: [] for cell in every}, {cell.name: [] for cell in every})

    def write(self, file: Path) -> None:
        lines = [f'"done": {json.dumps(self.done)}']
        for kind in ("needles", "continuations"):
            cells = ",\n".join(f"{json.dumps(name)}: {json.dumps(rows)}" for name, rows in getattr(self, kind).items())
            lines.append(f'"{kind}": {{\n{cells}\n}}')
        write_text(file, "{\n" + ",\n".join(lines) + "\n}\n")


def parts(size: Size) -> list[Part]:
    """Round by round, so that wherever a run is cut every length has had about as many prompts; short ones first."""
    kinds = [("needles", length) for length in size.lengths] + [("continuations", length) for length in size.contexts]
    kinds.sort(key=lambda kind: kind[1])
    return [Part(kind, length, number) for number in range(size.rounds) for kind, length in kinds]


def samples_of(part: Part, size: Size, tokenizer: Any) -> list[Sample]:
    """Every `rounds`-th of the study's."""
    if part.kind == "needles":
        every = needles(tokenizer, part.length, size.depths, size.each)
    else:
        every = continuations(tokenizer, part.length, size.scored + 1, size.pieces)
    return every[part.round :: size.rounds]


def study(model: StudyModel, samples: list[Sample], part: Part, every: list[Cell], rows: Rows) -> None:
    """Adds to `rows` what each cell made of the part's samples."""
    start = time.perf_counter()
    prompts = model.prefill([sample.prompt for sample in samples])
    prefilled = time.perf_counter()
    answers = torch.tensor([sample.answer for sample in samples], device=model.device)
    for cell in every:
        if not cell.fits(prompts.length):
            continue
        logprobs = model.continued(prompts, cell.options(prompts.length), answers.tolist())
        if part.kind == "needles":
            likeliest = (logprobs.argmax(-1) == answers).tolist()
            for sample, digits in zip(samples, likeliest, strict=True):
                rows.needles[cell.name].append([part.length, sample.depth, all(digits), sum(digits)])
        else:
            # The first token is the prefill's, by the whole cache: it says nothing about a compressed one.
            losses = -logprobs.gather(2, answers[..., None])[:, 1:, 0].mean(1)
            for sample, loss in zip(samples, losses.tolist(), strict=True):
                rows.continuations[cell.name].append([part.length, sample.source, round(loss, 5)])
    rows.done[part.name] = round(time.perf_counter() - start, 1)
    took = f"{prefilled - start:.0f} s of prefill, {rows.done[part.name]:.0f} s in all"
    print(f"{part.name}: {len(samples)} prompts, {took}", flush=True)


def write(out: Path, record: dict[str, Any], rows: Rows, size: Size, every: Sequence[Cell]) -> dict[str, Any]:
    """The study as far as it is done; returns the figures."""
    contexts = sorted({row[0] for row in rows.continuations["full"]})
    result = figures(rows.needles, rows.continuations, every, contexts)
    left = [part.name for part in parts(size) if part.name not in rows.done]
    rows.write(out / ROWS)
    write_text(
        out / "kv_quality_table.md",
        f"{HEAD.format(done=len(rows.done), all=len(parts(size)))}{table(result, contexts)}\n",
    )
    write_json(
        out / "kv_quality.json",
        record | {"seconds": sum(rows.done.values()), "size": asdict(size), "not_done": left, "figures": result},
    )
    for heads in dict.fromkeys(cell.heads for cell in every if cell.policy not in ("full", "streaming")):
        draw(out / f"kv_quality_{heads}.png", rows.needles, result, every, heads, contexts)
    return result


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=SIZES, default="full", help="small: seconds; cpu: shorter prompts; full: GPU")
    parser.add_argument("--small", dest="size", action="store_const", const="small", help="the same as --size small")
    parser.add_argument("--resume", action="store_true", help="go on from the rows in --out")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--kernel", choices=("triton", "reference"), help="default: triton on a GPU")
    parser.add_argument("--heads", nargs="+", choices=HEADS, default=list(HEADS))
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of kv_quality.json, its rows and heat maps")
    parser.add_argument("--threads", type=int, help="CPU threads; 1 on a busy machine")
    asked = parser.parse_args()
    if asked.threads:
        torch.set_num_threads(asked.threads)
    os.environ.setdefault("TRITON_F32_DEFAULT", "ieee")
    triton = asked.kernel == "triton" or (asked.kernel is None and asked.device == "cuda")
    size, every = SIZES[asked.size], cells(POLICIES, asked.heads)
    rows = Rows.of(every)
    if asked.resume and (asked.out / ROWS).exists():
        rows = Rows(**json.loads((asked.out / ROWS).read_text()))
        if set(rows.needles) != {cell.name for cell in every}:
            raise SystemExit(f"{asked.out / ROWS} is of other caches. Fix: the same --heads, or no --resume.")
    folder = resolve_model(load(["model=smollm2"])).model.path
    model = StudyModel(folder, {name: build_policy(name, {}) for name in POLICIES}, asked.device, triton)
    record: dict[str, Any] = {
        "bench": "kv_quality",
        "hardware": torch.cuda.get_device_name()
        if asked.device == "cuda"
        else f"{os.cpu_count()} x {platform.machine()}",
        "versions": versions(),
        "command": " ".join(["python -m bench.kv_quality", *sys.argv[1:]]),
        "model": "smollm2",
        "kernel": "triton" if triton else "reference",
    }
    for part in parts(size):
        if part.name not in rows.done:
            study(model, samples_of(part, size, model.tokenizer), part, every, rows)
            write(asked.out, record, rows, size, every)
    result = write(asked.out, record, rows, size, every)
    print((asked.out / "kv_quality_table.md").read_text())
    summary = {name: entry["retrieval"][0] for name, entry in result.items() if entry["retrieval"]}
    print(json.dumps(record | {"figures": summary}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
