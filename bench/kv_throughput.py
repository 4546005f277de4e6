"""`python -m bench.kv_throughput --arms full longflow:1800 [--mix stationary|group_end]`: decoding, end to end.

Stock vLLM with a compressed cache against stock vLLM with its own, in the same memory, each with the most sequences
that it can hold without ever preempting one. Shape: Qwen3-1.7B with a vocabulary of 32 000 and random weights, bf16.

    stationary  prompts of 512 to 16 896 tokens, evenly spread: what a server meets, some sequences young, some old
    group_end   all prompts of 16 384 tokens: a group of samples near its end

Each arm (`full`, `fp8`, `policy:budget`) is an engine in its own process, with one size of pool for all. Timed: 256
decode steps in a row with every sequence running, after the last prompt is in and a few steps more; 64 sequences, then
the most. Prompts are not timed; they are in within 150 s, or fewer sequences run and `cap` says so. Predicted: a step
from the kernels' own figures (bench/results/longflow_kernel.json), weights and a rest; `spent` is what a profiler sees.

Ratios are within one command, to its first arm. Results of several commands are kept side by side in
kv_throughput.json, written after every arm. `--smoke` runs a tiny model on a CPU: it shows that the code works
(its predictions stay an H200's).

    speedup_budget_1800, speedup_budget_3200, speedup_fp8, speedup_group_end   tokens/s over the full cache's
    speedup_over_fp8       the best of the stationary mix over fp8's, both as speedups over full
    concurrency_over_full  sequences over the full cache's, by arm
    speedup_small_batch    of the batch of 64, by arm
    preemptions            in all
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from bench.kv_throughput_plan import H200, SMOKE, Arm
from rltk.errors import ConfigError
from rltk.files import write_json, write_text
from rltk.manifest import versions

LEAST = 45  # seconds without which an arm is not started


def figures(commands: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """What is quoted, of all commands' arms; a later command's arm counts where two have the same."""
    speedups: dict[str, float] = {}
    predicted: dict[str, float] = {}
    small: dict[str, float] = {}
    concurrency: dict[str, float] = {}
    preemptions = 0
    for command in commands.values():
        arms = command["arms"]
        preemptions += sum(b["preemptions"] for arm in arms.values() for b in arm["batches"].values())
        base, *others = arms.values()
        for arm in others:
            name = f"group_end {arm['arm']}" if command["mix"] == "group_end" else arm["arm"]
            measured = arm["batches"].keys() & base["batches"].keys()
            if "largest" in measured:
                ours, theirs = arm["batches"]["largest"], base["batches"]["largest"]
                speedups[name] = ours["tokens_per_s"] / theirs["tokens_per_s"]
                predicted[name] = ours["predicted"]["tokens_per_s"] / theirs["predicted"]["tokens_per_s"]
                concurrency[name] = ours["sequences"] / theirs["sequences"]
            if "small" in measured:
                ours, theirs = arm["batches"]["small"], base["batches"]["small"]
                small[name] = ours["tokens_per_s"] / theirs["tokens_per_s"]
    budgets = {name.partition(":")[2]: speedup for name, speedup in speedups.items() if name.startswith("longflow:")}
    found = {f"speedup_budget_{budget}": speedup for budget, speedup in budgets.items()}
    for name, key in (("group_end longflow:1800", "speedup_group_end"), ("fp8", "speedup_fp8")):
        if name in speedups:
            found[key] = speedups[name]
    if budgets and "fp8" in speedups:
        found["speedup_over_fp8"] = max(budgets.values()) / speedups["fp8"]
    return {
        **found, "predicted_speedup": predicted, "speedup_small_batch": small, "concurrency_over_full": concurrency,
        "preemptions": preemptions,
    }  # fmt: skip


def rows(command: dict[str, Any]) -> list[str]:
    heads = ("sequences", "mean slots", "step ms", "predicted", "off", "tokens/s", "over first", "prompts s",
             "preempted")  # fmt: skip
    lines = [f"{command['mix']:16}" + "".join(f"{head:>12}" for head in heads)]
    base = next(iter(command["arms"].values()))
    for arm in command["arms"].values():
        for name, batch in arm["batches"].items():
            against = base["batches"].get(name)
            over = f"{batch['tokens_per_s'] / against['tokens_per_s']:.2f}" if against else ""
            values = (f"{batch['sequences']}", f"{batch['mean_slots']:.0f}", f"{batch['step_ms']:.2f}",
                      f"{batch['predicted']['step_ms']:.2f}", f"{batch['over_predicted'] - 1:+.0%}",
                      f"{batch['tokens_per_s']:.0f}", over, f"{batch['prefill_s']:.0f}",
                      f"{batch['preemptions']}")  # fmt: skip
            lines.append(f"{arm['arm']:16}" + "".join(f"{value:>12}" for value in values))
            for seen, parts in (("predicted", batch["predicted"]), ("profiled", batch.get("spent", {}))):
                parts = {key[:-3]: value for key, value in parts.items() if key.endswith("_ms") and key != "step_ms"}
                if parts:
                    lines.append(f"    {seen} ms: " + ", ".join(f"{key} {value:.2f}" for key, value in parts.items()))
        if arm["cap"]:
            lines.append(f"    {arm['cap']}")
    return lines


def run_arm(arm: Arm, arguments: argparse.Namespace, folder: Path, left: float) -> dict[str, Any] | None:
    """In a process of its own; what it had measured when it ended, None if nothing."""
    into = folder / f"{arm.name.replace(':', '-')}.json"
    log = arguments.out / "kv_throughput_logs" / f"{arguments.mix}-{into.stem}.log"
    log.parent.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-u", "-m", "bench.kv_throughput", "--mix", arguments.mix, "--arms", arm.name,
               "--into", str(into), *(["--smoke"] if arguments.smoke else []),
               *(["--only-largest"] if arguments.only_largest else [])]  # fmt: skip
    with open(log, "w") as stream:
        try:
            code: object = subprocess.run(command, stderr=stream, timeout=left).returncode
        except subprocess.TimeoutExpired:
            code = f"{left:.0f} s without an end"
    if code != 0:
        print(f"  {arm.name} ended with {code}:\n{log.read_text(errors='replace')[-3000:]}", flush=True)
    return json.loads(into.read_text()) if into.exists() else None


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m bench.kv_throughput", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--arms", nargs="+", default=["full", "longflow:1800"])
    parser.add_argument("--mix", choices=("stationary", "group_end"), default="stationary")
    parser.add_argument("--only-largest", action="store_true", help="not the batch of 64 besides")
    parser.add_argument("--seconds", type=float, default=570, help="of the whole command; an arm that runs then is cut")
    parser.add_argument("--smoke", action="store_true", help="a tiny model, on a CPU")
    parser.add_argument("--out", type=Path, default=Path("bench/results"))
    parser.add_argument("--into", type=Path, help=argparse.SUPPRESS)  # in an arm's own process
    arguments = parser.parse_args()
    arms = [Arm(name, SMOKE if arguments.smoke else H200) for name in arguments.arms]
    try:
        for arm in arms:
            _ = arm.settings
    except ConfigError as error:
        parser.error(str(error))
    if arguments.into:
        from bench.kv_throughput_arm import run

        run(arms[0], arguments.mix, not arguments.only_largest, arguments.into)
        return 0

    begun, complete = time.perf_counter(), True
    name = "kv_throughput_smoke" if arguments.smoke else "kv_throughput"
    path, called = arguments.out / f"{name}.json", f"python -m bench.kv_throughput {' '.join(sys.argv[1:])}"
    known = json.loads(path.read_text())["figures"]["commands"] if path.exists() else {}
    key = f"{arguments.mix}: {' '.join(arguments.arms)}"
    known.pop(key, None)
    here: dict[str, Any] = {"mix": arguments.mix, "command": called, "arms": {}}
    line: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        for arm in arms:
            left = arguments.seconds - (time.perf_counter() - begun)
            found = run_arm(arm, arguments, Path(folder), left) if left > LEAST else None
            complete &= found is not None and "largest" in found["batches"]
            if found is None:
                print(f"  {arm.name}: nothing measured", flush=True)
                if arm is arms[0]:
                    return 1  # nothing to compare with
                continue
            here["arms"][arm.name] = found
            commands = {**known, key: here}
            line = {
                "bench": "kv_throughput", "hardware": found["hardware"], "versions": versions(), "command": called,
                "figures": {**figures(commands), "commands": commands},
            }  # fmt: skip
            write_json(path, line)
    print("\n".join([f"{line['hardware']}, {time.perf_counter() - begun:.0f} s", *rows(here)]))
    table = [text for command in line["figures"]["commands"].values() for text in [*rows(command), ""]]
    write_text(arguments.out / f"{name}.log", "\n".join([line["hardware"], *table]) + "\n")
    del line["figures"]["commands"]
    print(json.dumps(line))
    return 0 if complete else 1


if __name__ == "__main__":
    sys.exit(main())
