"""`python -m bench.objectives [--sequences 512] [--tokens 4096] [--repeats 5]`: what each objective costs.

From a filled `TokenBatch` to the gradient on `new`, `prepare` included, next to grpo in the same run: time and peak
memory as ratios (at most 1.5). Repeats go round robin over the objectives, so that a busy machine slows all alike; the
ratio is of medians. On a GPU if there is one; on a CPU each measurement is a process of its own.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from rltk.algorithms import Objective, TokenBatch, Totals, build_objective
from rltk.algorithms.registry import available
from rltk.files import write_json
from rltk.manifest import versions

LIMIT = 1.5
WIDTH = 64  # of the hidden states that DelTA reads


def filled(sequences: int, tokens: int, device: torch.device) -> TokenBatch:
    """Ragged sequences in groups of 8, new, old, mu and ref a little apart, every field that the objectives read."""
    g = torch.Generator(device).manual_seed(0)

    def noise(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=g, device=device)

    mu = -noise(sequences, tokens).abs()
    old = mu + 0.01 * noise(sequences, tokens)
    length = torch.randint(tokens // 4, tokens + 1, (sequences, 1), generator=g, device=device)
    reward = (noise(sequences) > 0).float()
    return TokenBatch(
        new=old + 0.01 * noise(sequences, tokens), old=old, mu=mu,
        mask=torch.arange(tokens, device=device) < length, advantage=reward * 2 - 1,
        group=torch.arange(sequences, device=device) // 8, ref=old + 0.01 * noise(sequences, tokens),
        entropy=noise(sequences, tokens).sigmoid(), hellinger=1e-4 * noise(sequences, tokens).abs(),
        forward_kl=1e-4 * noise(sequences, tokens).abs(), reward=reward,
        pass_rate=torch.full_like(reward, 0.5), group_length=length[:, 0].float(),
    )  # fmt: skip


def gradient(objective: Objective, batch: TokenBatch, totals: Totals) -> torch.Tensor:
    batch = objective.prepare(batch, None, True)
    new = batch.new.detach().requires_grad_()
    objective.loss(replace(batch, new=new), totals)[0].backward()
    assert new.grad is not None
    return new.grad


def once(objective: Objective, batch: TokenBatch, totals: Totals) -> tuple[float, int]:
    """Seconds, and bytes at the peak over what was there before."""
    if batch.new.is_cuda:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before, start = torch.cuda.memory_allocated(), time.perf_counter()
        gradient(objective, batch, totals)
        torch.cuda.synchronize()
        return time.perf_counter() - start, torch.cuda.max_memory_allocated() - before
    return _forked(objective, batch, totals)


def _forked(objective: Objective, batch: TokenBatch, totals: Totals) -> tuple[float, int]:
    """In a child of its own, whose peak resident memory is read from the kernel: torch keeps no count on a CPU."""
    read, write = os.pipe()
    if (child := os.fork()) == 0:
        gradient(objective, batch.select(slice(0, 8)), Totals.of(batch.mask[:8]))  # whatever is made once
        Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew here
        before, start = _memory("VmRSS"), time.perf_counter()
        gradient(objective, batch, totals)
        seconds = time.perf_counter() - start
        os.write(write, json.dumps([seconds, _memory("VmHWM") - before]).encode())
        os._exit(0)
    os.close(write)
    with os.fdopen(read) as pipe:
        text = pipe.read()
    os.waitpid(child, 0)
    if not text:
        raise RuntimeError(f"{objective!r} died in its child process")
    seconds, peak = json.loads(text)
    return seconds, peak


def _memory(field: str) -> int:
    line = next(x for x in Path("/proc/self/status").read_text().splitlines() if x.startswith(field))
    return int(line.split()[1]) * 1024


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.objectives", description=__doc__)
    parser.add_argument("--sequences", type=int, default=512)
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--out", type=Path, default=None)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    batch = filled(arguments.sequences, arguments.tokens, device)
    totals = Totals.of(batch.mask)
    objectives = {name: build_objective(name) for name in available("rltk.algorithms", Objective)}
    rows: dict[str, list[tuple[float, int]]] = {name: [] for name in objectives}
    for _ in range(arguments.repeats):
        for name, objective in objectives.items():
            full = batch
            if "hidden" in objective.needs:
                full = replace(batch, hidden=torch.randn(*batch.new.shape, WIDTH, device=device))
            rows[name].append(once(objective, full, totals))
    figures: dict[str, Any] = {}
    base = _median(rows["grpo"])
    print(f"{'objective':14}{'ms':>8}{'MiB':>8}{'time/grpo':>12}{'memory/grpo':>12}")
    for name, values in rows.items():
        seconds, peak = _median(values)
        figures[name] = {"ms": 1e3 * seconds, "mib": peak / 2**20, "time": seconds / base[0], "memory": peak / base[1]}
        print(f"{name:14}" + "".join(f"{v:>{w}.{d}f}" for v, w, d in zip(figures[name].values(), (8, 8, 12, 12),
              (1, 0, 2, 2), strict=True)))  # fmt: skip
    over = [name for name, row in figures.items() if max(row["time"], row["memory"]) > LIMIT]
    print(f"over {LIMIT} x grpo: {', '.join(over) or 'none'}")
    hardware = torch.cuda.get_device_name() if device.type == "cuda" else f"{platform.machine()}, 1 thread"
    line = {"bench": "objectives", "hardware": hardware, "versions": versions(),
            "command": f"python -m bench.objectives {' '.join(sys.argv[1:])}".strip(), "figures": figures}  # fmt: skip
    if arguments.out:
        write_json(arguments.out, line)
    print(json.dumps(line))
    return 0


def _median(values: list[tuple[float, int]]) -> tuple[float, float]:
    return statistics.median(s for s, _ in values), statistics.median(p for _, p in values)


if __name__ == "__main__":
    sys.exit(main())
