"""`python -m bench.longflow_kernel`: a decode step of the compressed cache against FlashAttention 3 at equal length.

Shape: one layer of a 1.7B Qwen3 (16 query heads, 8 KV heads, head size 128, bf16). Cells: batch 64 and 256, 3 200 and
16 384 slots, all full, pages in random order. The floor of a step is its K and V read once at the measured copy
bandwidth; GB/s count those bytes alone, so whatever else is read or written shows as a loss. FA3 is vLLM's, over the
layouts and page sizes that it may meet there, its best of them. Steps are timed as CUDA graphs, FA3's and ours in turn.

    bandwidth_share_of_fa3  attention + scores + eviction: GB/s over FA3's, the least of the four cells (aim 0.73)
    eviction_overhead       time of a step with scores and eviction over one with attention alone, - 1: the most
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from rltk.files import write_json, write_text
from rltk.kernels.decode import decode
from rltk.kernels.state import NO_CAP, DecodeSettings, DecodeState

Q_HEADS, KV_HEADS, DIM, PAGE = 16, 8, 128, 64
SLOT = KV_HEADS * 2 * DIM * 2  # bytes of K and V
CELLS = ((64, 3200), (256, 3200), (64, 16384), (256, 16384))
FLASH_LAYOUTS = (("NHD", 16), ("NHD", 64), ("HND", 64), ("HND", 128))  # (16: vLLM's default page)
FLASH_SPLITS = ((0, False), (1, False), (32, True))  # FA3's own choice; one; as vLLM's graphs: planned beforehand
Step = Callable[[], Any]


def graph(step: Step, calls: int) -> torch.cuda.CUDAGraph:
    """`calls` steps in one graph; the step runs once before, which compiles it."""
    step()
    torch.cuda.synchronize()
    captured = torch.cuda.CUDAGraph()
    with torch.cuda.graph(captured):
        for _ in range(calls):
            step()
    return captured


def seconds(run: Step) -> float:
    start, stop = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    run()
    stop.record()
    stop.synchronize()
    return start.elapsed_time(stop) / 1e3


def in_turn(steps: dict[str, Step], rounds: int, calls: int) -> dict[str, float]:
    """Median seconds of each step over rounds in which every one has its turn."""
    graphs = {name: graph(step, calls) for name, step in steps.items()}
    times: dict[str, list[float]] = {name: [] for name in steps}
    for number in range(rounds + 2):
        for name, captured in graphs.items():
            taken = seconds(captured.replay) / calls
            if number >= 2:  # the first two warm up
                times[name].append(taken)
    return {name: statistics.median(taken) for name, taken in times.items()}


def copy_bandwidth(pool: torch.Tensor) -> float:
    """Bytes read and written a second, copying half of the pool onto the other half: the better of two ways."""
    half = pool.numel() // 2
    source, target = pool[:half], pool[half : 2 * half]
    ways = (lambda: target.copy_(source), lambda: torch.mul(source, 1, out=target))
    best = min(statistics.median([seconds(way) for _ in range(12)][2:]) for way in ways)
    return 2 * half * pool.element_size() / best


class Cell:
    """A batch of full sequences in the pool. `longflow`, `attention` and `flash` make a step of it."""

    def __init__(self, pool: torch.Tensor, rows: int, slots: int) -> None:
        self.pool, self.rows, self.slots = pool, rows, slots
        shape = (rows, Q_HEADS + 2 * KV_HEADS, DIM)
        tokens = torch.randn(*shape, device="cuda").bfloat16()
        self.query, self.key, self.value = tokens.split([Q_HEADS, KV_HEADS, KV_HEADS], 1)

    def _pages(self, page: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Flat memory of the pages, the first being nobody's, and a block table of shuffled pages."""
        per_row = -(-self.slots // page)
        order = torch.randperm(self.rows * per_row, generator=torch.Generator().manual_seed(0))
        table = 1 + order.view(self.rows, per_row).int().cuda()
        return self.pool[: (1 + self.rows * per_row) * page * SLOT // 2], table

    def _ours(self, mode: str, heads: str, length: int) -> Step:
        memory, table = self._pages(PAGE)
        cache = memory.view(-1, KV_HEADS, PAGE, 2 * DIM)
        settings = DecodeSettings(mode, DIM**-0.5, NO_CAP if mode == "append" else self.slots, sinks=4)
        state = DecodeState.allocate(settings, len(cache), KV_HEADS, PAGE, heads=heads, device="cuda")
        state.evict.random_(4, self.slots)
        lengths = torch.full((self.rows,), length, dtype=torch.int32, device="cuda")
        output = torch.empty_like(self.query, memory_format=torch.contiguous_format)

        def step() -> torch.Tensor:
            decode(self.query, self.key, self.value, cache, table, lengths, state, settings, output)
            return output

        return step

    def longflow(self, heads: str = "shared") -> Step:
        """Every row holds all its slots and gives one up: attention, scores and eviction."""
        return self._ours("longflow", heads, self.slots + 1)

    def attention(self) -> Step:
        """The new token takes the last slot."""
        return self._ours("append", "shared", self.slots)

    def flash(self, layout: str, page: int, splits: int, planned: bool) -> Step:
        from vllm.vllm_flash_attn.flash_attn_interface import flash_attn_varlen_func, get_scheduler_metadata

        memory, table = self._pages(page)
        shape = (-1, page, KV_HEADS, 2 * DIM) if layout == "NHD" else (-1, KV_HEADS, page, 2 * DIM)
        cache = memory.view(*shape) if layout == "NHD" else memory.view(*shape).transpose(1, 2)
        lengths = torch.full((self.rows,), self.slots, dtype=torch.int32, device="cuda")
        starts = torch.arange(self.rows + 1, dtype=torch.int32, device="cuda")
        plan = None
        if planned:
            plan = get_scheduler_metadata(
                self.rows, 1, self.slots, Q_HEADS, KV_HEADS, DIM, lengths, torch.bfloat16, cu_seqlens_q=starts,
                page_size=page, causal=True, num_splits=splits,
            )  # fmt: skip
        query = self.query.contiguous()
        output = torch.empty_like(query)
        return lambda: flash_attn_varlen_func(
            query, cache[..., :DIM], cache[..., DIM:], 1, starts, self.slots, seqused_k=lengths,
            softmax_scale=DIM**-0.5, causal=True, block_table=table, out=output, scheduler_metadata=plan,
            num_splits=splits, fa_version=3,
        )  # fmt: skip


def check(pool: torch.Tensor) -> None:
    """Our step against its float64 reference, in this shape, and its attention against FA3's. Raises AssertionError."""
    from tests.gpu.kernels import Shape, check_decode, decode_case

    for heads in ("shared", "per_kv_head"):
        shape = Shape("longflow", heads, Q_HEADS // KV_HEADS, KV_HEADS, DIM, PAGE, 3200, 4, dtype=torch.bfloat16)
        check_decode(decode, decode_case(shape, "cuda"), torch.bfloat16)
    cell = Cell(pool, 4, 3200)
    ours = cell.attention()()
    torch.testing.assert_close(ours, cell.flash("HND", PAGE, 1, False)(), rtol=1e-2, atol=2e-3)


def measure(pool: torch.Tensor, rows: int, slots: int, copy: float, rounds: int) -> dict[str, Any]:
    cell, size = Cell(pool, rows, slots), rows * slots * SLOT
    calls = max(1, round(2e-3 / (size / 4e12)))
    flash = {
        f"{layout} {page} splits {splits or 'auto'}{' planned' if planned else ''}": cell.flash(
            layout, page, splits, planned
        )
        for layout, page in FLASH_LAYOUTS
        for splits, planned in FLASH_SPLITS
    }
    tried = in_turn(flash, 3, calls)
    best = min(tried, key=lambda name: tried[name])
    ours = {"shared": cell.longflow(), "per_kv_head": cell.longflow("per_kv_head"), "attention": cell.attention()}
    times = in_turn(ours | {"fa3": flash[best]}, rounds, calls)
    speed = {name: size / taken / 1e9 for name, taken in times.items()}
    return {
        "batch": rows, "slots": slots, "floor_us": 1e6 * size / copy, "us": {k: 1e6 * t for k, t in times.items()},
        "gb_per_s": speed, "share_of_copy": speed["shared"] * 1e9 / copy,
        "share_of_fa3": speed["shared"] / speed["fa3"], "share_of_fa3_per_kv_head": speed["per_kv_head"] / speed["fa3"],
        "eviction_overhead": times["shared"] / times["attention"] - 1, "fa3_best": best,
        "fa3_tried_gb_per_s": {name: size / taken / 1e9 for name, taken in tried.items()},
    }  # fmt: skip


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.longflow_kernel", description=__doc__)
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--out", type=Path, default=Path("bench/results"))
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("bench.longflow_kernel times kernels on a GPU; there is none here")
    largest = max(rows * slots for rows, slots in CELLS)
    pool = torch.empty((largest + 128) * SLOT // 2, dtype=torch.bfloat16, device="cuda")
    for part in pool.split(1 << 28):
        part.normal_()
    check(pool)
    lines = [f"{torch.cuda.get_device_name()}: {Q_HEADS} query heads, {KV_HEADS} KV heads, head size {DIM}, bf16"]
    copy = copy_bandwidth(pool[: 1 << 31])
    lines.append(f"copy {copy / 1e9:.0f} GB/s (read + written); correct against the float64 reference and FA3")
    heads = ("batch", "slots", "floor us", "FA3 us", "ours us", "FA3 GB/s", "ours", "of FA3", "of copy", "per head",
             "attn only", "eviction")  # fmt: skip
    lines.append("".join(f"{head:>10}" for head in heads))
    print("\n".join(lines), flush=True)
    cells = []
    for rows, slots in CELLS:
        cells.append(row := measure(pool, rows, slots, copy, arguments.rounds))
        us, speed = row["us"], row["gb_per_s"]
        values = (f"{rows}", f"{slots}", f"{row['floor_us']:.0f}", f"{us['fa3']:.0f}", f"{us['shared']:.0f}",
                  f"{speed['fa3']:.0f}", f"{speed['shared']:.0f}", f"{row['share_of_fa3']:.1%}",
                  f"{row['share_of_copy']:.1%}", f"{row['share_of_fa3_per_kv_head']:.1%}",
                  f"{speed['attention']:.0f}", f"{row['eviction_overhead']:.1%}")  # fmt: skip
        lines.append("".join(f"{value:>10}" for value in values) + f"   FA3: {row['fa3_best']}")
        print(lines[-1], flush=True)
    figures = {
        "bandwidth_share_of_fa3": min(row["share_of_fa3"] for row in cells),
        "eviction_overhead": max(row["eviction_overhead"] for row in cells),
        "copy_gb_per_s": copy / 1e9,
        "cells": cells,
    }
    line = {
        "bench": "longflow_kernel",
        "hardware": torch.cuda.get_device_name(),
        "versions": {name: metadata.version(name) for name in ("torch", "triton", "vllm")},
        "command": f"python -m bench.longflow_kernel --rounds {arguments.rounds}",
        "figures": figures,
    }
    print(json.dumps(line))
    write_json(arguments.out / "longflow_kernel.json", line)
    write_text(arguments.out / "longflow_kernel.log", "\n".join([*lines, json.dumps(line)]) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
