"""`python -m tests.gpu.kernels [WORD ...]`: the Triton kernels against their float64 references on a GPU, and inside a
CUDA graph. WORD: only the checks that have it in their names, such as DelTA.

The unit tests call the same checks with interpreted kernels. Prints a table, and a JSON line last.
"""

from __future__ import annotations

import copy
import json
import multiprocessing
import os
import sys
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from typing import Any

import torch

from rltk.algorithms import build_objective, delta
from rltk.kernels import decode_reference, prompt_scores_reference
from rltk.kernels.state import NO_CAP, DecodeSettings, DecodeState
from tests.gpu import delta_weights

TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 1e-2, torch.float16: 2e-3}  # of outputs near 1; the output is rounded
MODES = (("longflow", "shared"), ("longflow", "per_kv_head"), ("h2o", "shared"), ("h2o", "per_kv_head"),
         ("ring", "shared"), ("append", "shared"))  # fmt: skip


@dataclass(frozen=True)
class Shape:
    """A decode step to try. Its rows have 0 (padding), 1, cap - 1, cap and cap + 9 tokens."""

    mode: str = "longflow"
    heads: str = "shared"
    group: int = 2
    kv_heads: int = 2
    dim: int = 16
    page: int = 16
    cap: int = 20
    sinks: int = 2
    recent: int = 3
    record: bool = True
    dtype: torch.dtype = torch.float32


def decode_case(shape: Shape, device: str = "cpu", seed: int = 0) -> list[Any]:
    """Arguments of `decode`: random tokens, state as if long under way, and NaN wherever nothing was ever stored."""
    torch.manual_seed(seed)
    lengths = torch.tensor([0, 1, shape.cap - 1, shape.cap, shape.cap + 9])
    rows, per_row = len(lengths), -(-(shape.cap + 9) // shape.page)
    cap = NO_CAP if shape.mode == "append" else shape.cap
    settings = DecodeSettings(shape.mode, shape.dim**-0.5, cap, shape.sinks, shape.recent, pseudo=1)
    blocks = 1 + rows * per_row
    table = (1 + torch.randperm(rows * per_row).view(rows, per_row)).int()
    state = DecodeState.allocate(
        settings, blocks, shape.kv_heads, shape.page, heads=shape.heads, record_rows=rows if shape.record else 0
    )
    first = table[:, 0].long()
    dropped = torch.randint(0, 9, (rows,)).int()
    state.dropped[first] = dropped
    state.evict[first] = torch.randint(shape.sinks, shape.cap, (rows, state.evict.shape[1])).int()
    slots = per_row * shape.page
    # Positions of old tokens: any below the new one's, the same in every head.
    ages = torch.stack([torch.randperm(slots) - slots for _ in range(rows)]) + (lengths + dropped)[:, None] - 2
    at = table.long()[:, :, None].expand(-1, -1, shape.page).flatten(1), torch.arange(slots) % shape.page
    if state.slot_pos is not None:
        state.slot_pos[at[0], :, at[1]] = ages[:, :, None].int()
    if state.acc is not None:
        state.acc.copy_(torch.rand_like(state.acc))
    cache = torch.randn(blocks, shape.kv_heads, shape.page, 2 * shape.dim)
    held = torch.where(lengths <= cap, lengths - 1, cap)
    row, slot = (torch.arange(slots) >= held[:, None]).nonzero(as_tuple=True)
    cache[at[0][row, slot], :, at[1][slot]] = torch.nan
    # As a model hands them over: cut out of one projection's output.
    width = shape.kv_heads * shape.dim
    qkv = torch.randn(rows, (shape.group + 2) * width).to(device, shape.dtype)
    query, key, value = (
        part.unflatten(1, (-1, shape.dim)) for part in qkv.split([shape.group * width, width, width], 1)
    )
    output = torch.full_like(query, torch.nan)
    seq_lens = torch.where(lengths > 0, lengths + dropped, 0).int().to(device)
    for name, tensor in vars(state).items():
        setattr(state, name, None if tensor is None else tensor.to(device))
    return [query, key, value, cache.to(device, shape.dtype), table.to(device), seq_lens, state, settings, output]


def check_decode(decode: Callable[..., None], arguments: list[Any], dtype: torch.dtype) -> float:
    """Run a step by `decode` and by the float64 reference; returns the outputs' greatest difference. Asserts that it is
    within the type's rounding and that all they store agrees."""
    wide = [t.double() if torch.is_tensor(t) and t.is_floating_point() else copy.deepcopy(t) for t in arguments]
    decode(*arguments)
    decode_reference.decode(*wide)
    ours, theirs = arguments[6], wide[6]
    torch.testing.assert_close(arguments[8].double(), wide[8], rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype])
    torch.testing.assert_close(arguments[3].double(), wide[3], rtol=0, atol=0, equal_nan=True)
    for name in ("dropped", "evict", "slot_pos", "evicted"):
        if getattr(ours, name) is not None:
            assert torch.equal(getattr(ours, name), getattr(theirs, name)), name
    if ours.acc is not None:
        torch.testing.assert_close(ours.acc, theirs.acc, rtol=1e-4, atol=1e-5)
    return (arguments[8].double() - wide[8]).abs().max().item()


def tied_case(shape: Shape, device: str = "cpu") -> list[Any]:
    """Every token of every row the same: all scores are equal, so the first unprotected slot must go."""
    arguments = decode_case(shape, device)
    arguments[1].fill_(0)  # whatever the query, and in whatever order it is summed: a logit of 0
    arguments[2].fill_(1)
    arguments[3][..., : shape.dim] = 0
    arguments[3][..., shape.dim :] = 1
    return arguments


def check_prompt_scores(
    prompt_scores: Callable[..., torch.Tensor], window: int, length: int, group: int, dim: int = 16, kv_heads: int = 2,
    dtype: torch.dtype = torch.float32, device: str = "cpu",
) -> float:  # fmt: skip
    """Of 3 prompts against the float64 reference, and of each alone against the same bits; the greatest difference of
    the mean scores, relative to the mean score. Queries and keys are views with strides of their own, as the engine's
    are."""
    torch.manual_seed(window + length)
    query = torch.randn(3, length, kv_heads * group, dim, device=device, dtype=dtype)[:, length - window :]
    key = torch.randn(3, length + 2, kv_heads, dim, device=device, dtype=dtype)[:, :length]
    worst = 0.0
    for reduce, unit in (("mean", 1 / length), ("sum", window * group / length)):
        ours = prompt_scores(query, key, dim**-0.5, reduce).double()
        theirs = prompt_scores_reference.prompt_scores(query.double(), key.double(), dim**-0.5, reduce)
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4 * unit)
        alone = prompt_scores(query[1:2], key[1:2], dim**-0.5, reduce)[0].double()
        assert torch.equal(alone, ours[1]), "another score in another batch"
        worst = max(worst, ((ours - theirs).abs().max() / unit).item())
    return worst


def check_graph(decode: Callable[..., None], shape: Shape, steps: int = 12) -> None:
    """Several steps replayed from one CUDA graph leave bit for bit what the same steps leave eagerly."""
    eager = decode_case(shape, "cuda")
    replayed = copy.deepcopy(eager)
    fresh = copy.deepcopy(eager)
    decode(*copy.deepcopy(eager))  # compiles, which a capture may not
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        decode(*replayed)
    for _ in range(steps):
        tokens = [torch.randn_like(t) for t in eager[:3]]
        for arguments in (eager, replayed):
            for held, new in zip(arguments[:3], tokens, strict=True):
                held.copy_(new)
        decode(*eager)
        graph.replay()
        for arguments in (eager, replayed):
            arguments[5] += (arguments[5] > 0).int()
            arguments[5].clamp_(max=(shape.cap + 9 if shape.mode == "append" else 1 << 20))
        assert torch.equal(eager[8], replayed[8]) and torch.equal(eager[3].nan_to_num(), replayed[3].nan_to_num())
        for name, tensor in vars(eager[6]).items():
            assert tensor is None or torch.equal(tensor, getattr(replayed[6], name)), name
    assert not torch.equal(eager[3].nan_to_num(), fresh[3].nan_to_num())


def _shapes() -> list[Shape]:
    bf16 = torch.bfloat16
    base = dict(kv_heads=4, dim=128, page=64, cap=700, sinks=4, recent=16)
    shapes = [Shape(mode, heads, dtype=t, **base) for mode, heads in MODES for t in (torch.float32, bf16)]
    shapes += [Shape(group=g, dtype=bf16, **base) for g in (1, 3, 4, 6, 8, 16)]
    shapes += [Shape(dtype=bf16, **base | {"page": page}) for page in (16, 32, 48, 128)]
    shapes += [Shape(dtype=t, **base | {"dim": dim}) for dim in (64, 256) for t in (torch.float32, bf16)]
    shapes += [Shape(dtype=torch.float16, **base), Shape(record=False, dtype=bf16, **base)]
    shapes += [Shape(mode, dtype=bf16, **base | {"cap": 3200, "kv_heads": 8}) for mode in ("longflow", "h2o")]
    return shapes + [
        Shape(mode, "shared", 3, kv_heads=3, dim=64, page=64, cap=cap, dtype=bf16)  # SmolLM2's heads
        for mode in ("longflow", "append")
        for cap in (65, 191)
    ]


def _decode_on_gpu(shape: Shape) -> float:
    from rltk.kernels.decode import decode

    if shape.dtype == torch.bfloat16 and shape.mode == "longflow":
        check_decode(decode, tied_case(shape, "cuda"), shape.dtype)
    return max(check_decode(decode, decode_case(shape, "cuda", seed), shape.dtype) for seed in range(2))


def _scores_on_gpu(window: int, length: int, group: int, dtype: torch.dtype) -> float:
    from rltk.kernels.prompt_scores import prompt_scores

    return check_prompt_scores(prompt_scores, window, length, group, 128, 4, dtype, "cuda")


def _graph_on_gpu(shape: Shape) -> float:
    from rltk.kernels.decode import decode

    check_graph(decode, shape)
    return 0.0


def _delta_cases() -> list[delta_weights.Case]:
    wide = dict(rows=40, tokens=2001)  # more tiles than programs
    bf16 = torch.bfloat16
    return [
        *(delta_weights.Case(refinements=r, dtype=t, **wide) for r in (0, 1, 2) for t in (torch.float32, bf16)),
        *(delta_weights.Case(width=w, dtype=bf16, rows=16, tokens=1024) for w in (576, 896, 4096)),
        *(delta_weights.Case(width=w, rows=16, tokens=1000) for w in (5, 100, 1536)),
        *(delta_weights.Case(advantages=a, rows=16, tokens=1000) for a in ((1.0, 0.0), (-1.0, 0.0), (0.0,))),
        delta_weights.Case(sure=True, **wide),
    ]


def _delta_on_gpu(case: delta_weights.Case) -> float:
    batch = case.batch("cuda")
    assert delta._fused(batch), "the kernels are passed by"
    first, second = (build_objective("delta").prepare(batch).advantage for _ in range(2))
    assert torch.equal(first, second), "the same batch, other bits"
    return delta_weights.check(case, "cuda")


def main(words: list[str]) -> int:
    if not torch.cuda.is_available():
        sys.exit("no GPU here: tests/unit/test_kernels*.py run the same checks with interpreted kernels")
    jobs: dict[str, tuple[Callable[..., float], tuple]] = {}
    for case in _delta_cases():
        name = f"DelTA's weights, {case.rows} x {case.tokens}, d = {case.width}, {case.dtype}"
        name += f", {case.refinements} refinements, advantages {case.advantages}{', sure' if case.sure else ''}"
        jobs[name] = _delta_on_gpu, (case,)
    for shape in _shapes():
        heads = f"{shape.group} x {shape.kv_heads} heads of {shape.dim}"
        name = f"{shape.mode} {shape.heads}, {heads}, pages of {shape.page}, cap {shape.cap}"
        jobs[f"{name}, {shape.dtype}{'' if shape.record else ', unrecorded'}"] = _decode_on_gpu, (shape,)
    for mode, heads in MODES:
        shape = Shape(mode, heads, kv_heads=4, dim=128, page=64, cap=200, sinks=4, recent=16, dtype=torch.bfloat16)
        jobs[f"{mode} {heads} in a CUDA graph, over eager steps"] = _graph_on_gpu, (shape,)
    for window, length, dtype in [(32, 5000, torch.bfloat16), (64, 777, torch.float32), (900, 900, torch.bfloat16)]:
        for group in (1, 2, 3, 8):
            name = f"prompt scores, {window} queries of {length} keys, G{group} {dtype}"
            jobs[name] = _scores_on_gpu, (window, length, group, dtype)
    jobs = {name: job for name, job in jobs.items() if all(word in name for word in words)}
    if not jobs:
        sys.exit(f"no check has {' '.join(words)} in its name")
    started, figures = time.perf_counter(), {}
    # Most of the time is compilation: many processes, each with its share of the shapes.
    with ProcessPoolExecutor(min(8, os.cpu_count() or 1), multiprocessing.get_context("spawn")) as processes:
        running = {name: processes.submit(check, *arguments) for name, (check, arguments) in jobs.items()}
        for name, done in running.items():
            figures[name] = done.result(timeout=540)
            print(f"{name:80} error {figures[name]:.1e}", flush=True)
    print(f"{len(figures)} checks passed in {time.perf_counter() - started:.0f} s")
    print(json.dumps({
        "bench": "gpu_kernels", "hardware": torch.cuda.get_device_name(),
        "command": " ".join(["python -m tests.gpu.kernels", *words]),
        "figures": {"checks": len(figures), "worst_error": max(figures.values())},
    }))  # fmt: skip
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
