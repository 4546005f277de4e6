"""`python -m bench.objectives [--sequences 512] [--tokens 4096] [--repeats 21]`: what each objective costs.

From a filled `TokenBatch` to the gradient on `new`, `prepare` included, next to grpo in the same run: time and peak
memory as ratios (at most 1.5). On a GPU also the number of kernels and their own time: what is left of the time where
the host runs ahead of the GPU, as it does after a model's forward pass. Then, apart, what the learner spends on the
fields that objectives ask for. On a GPU if there is one; else smaller, on one CPU thread.
"""

from __future__ import annotations

import argparse
import json
import platform
import sys
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch

from bench.cost import Work, costs, kernels
from bench.supply import SMALL, SMOLLM2, frozen_mib, supply
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


def objectives(batch: TokenBatch, repeats: int) -> dict[str, dict[str, float]]:
    """{name: {"ms", "mib", "time", "memory"}}, the last two over grpo's; on a GPU "kernels", "kernel_ms" and its ratio
    "kernel_time" too."""
    device = batch.new.device
    built = {name: build_objective(name) for name in available("rltk.algorithms", Objective)}
    # One tensor for the one objective that reads it: no other is charged for it.
    hidden = torch.randn(*batch.new.shape, WIDTH, device=device)
    totals = Totals.of(batch.mask)

    def work(objective: Objective) -> Work:
        full = replace(batch, hidden=hidden) if "hidden" in objective.needs else batch
        return lambda: gradient(objective, full, totals)

    works = {name: work(objective) for name, objective in built.items()}
    measured = costs(works, device, repeats)
    figures = {name: {"ms": 1e3 * seconds, "mib": peak / 2**20} for name, (seconds, peak) in measured.items()}
    if device.type == "cuda":
        for name, row in figures.items():
            row["kernels"], seconds = kernels(works[name])
            row["kernel_ms"] = 1e3 * seconds
    base = dict(figures["grpo"])
    for row in figures.values():
        row |= {"time": row["ms"] / base["ms"], "memory": row["mib"] / base["mib"]}
        if "kernel_ms" in row:
            row["kernel_time"] = row["kernel_ms"] / base["kernel_ms"]
    return figures


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.objectives", description=__doc__)
    on_gpu = torch.cuda.is_available()
    parser.add_argument("--sequences", type=int, default=512 if on_gpu else 128)
    parser.add_argument("--tokens", type=int, default=4096 if on_gpu else 1024)
    parser.add_argument("--repeats", type=int, default=21)
    parser.add_argument("--supply-repeats", type=int, default=3, help="0: leave out what the learner supplies")
    parser.add_argument("--out", type=Path, default=None)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    device = torch.device("cuda" if on_gpu else "cpu")
    batch = filled(arguments.sequences, arguments.tokens, device)
    figures = objectives(batch, arguments.repeats)
    _print(figures, ("ms", "mib", "time", "memory", *(["kernels", "kernel_ms", "kernel_time"] if on_gpu else [])))
    over = [name for name, row in figures.items() if max(row["time"], row["memory"]) > LIMIT]
    print(f"over {LIMIT} x grpo: {', '.join(over) or 'none'}")
    hardware = torch.cuda.get_device_name() if on_gpu else f"{platform.machine()}, 1 thread"
    line: dict[str, Any] = {
        "bench": "objectives", "hardware": hardware, "versions": versions(),
        "command": f"python -m bench.objectives {' '.join(sys.argv[1:])}".strip(),
        "sequences": arguments.sequences, "tokens": arguments.tokens, "hidden": WIDTH, "figures": figures,
    }  # fmt: skip
    if arguments.supply_repeats:
        shape = SMOLLM2 if on_gpu else SMALL
        lengths = batch.masked_lengths.tolist()
        del batch
        found = supply(lengths, shape, device, arguments.supply_repeats)
        print(f"supplied by the learner, {sum(lengths)} sampled tokens, {shape.name}: {shape.width} hidden, "
              f"{shape.vocabulary} vocabulary, {shape.dtype}; a field is what it adds to the pass")  # fmt: skip
        _print(found, ("ms", "mib"))
        weights = frozen_mib(shape)
        print(f"a reference also holds its weights: {weights:.0f} MiB")
        line["supply"] = {"shape": asdict(shape), "sampled": sum(lengths), "reference_mib": weights, "figures": found}
    if arguments.out:
        write_json(arguments.out, line)
    print(json.dumps(line))
    return 0


def _print(rows: dict[str, dict[str, float]], columns: tuple[str, ...]) -> None:
    digits = {"mib": 0, "kernels": 0, "time": 2, "memory": 2, "kernel_time": 2}
    print(f"{'':14}" + "".join(f"{column:>13}" for column in columns))
    for name, row in rows.items():
        print(f"{name:14}" + "".join(f"{row[column]:>13.{digits.get(column, 1)}f}" for column in columns))


if __name__ == "__main__":
    sys.exit(main())
