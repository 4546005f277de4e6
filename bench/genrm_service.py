"""`python -m bench.genrm_service faults|throughput|step`: the judge service under load and faults, its cost.

    faults      Real replicas (vLLM, model tiny, CPU). 2 000 questions of 8 clients, in bursts that no queue holds;
                three replicas are killed at seeded times at least 60 s apart, one is stopped, one writes garbage
                throughout. Exit code 1 unless every uid has one verdict and every value is what a sound judge says.
    throughput  SmolLM2 as judge, replies of 256 tokens: the service against plain vLLM on the same prompts, a process
                each. `--device cpu --model tiny` shows that it works.
    step        What a judge adds to a training step: SmolLM2 as policy and as judge on one GPU, for several splits of
                its memory, against the same run without the judge (bench/genrm_step.py says of what).

On a GPU: `python -m bench.genrm_service throughput --device gpu && python -m bench.genrm_service step --device gpu`.
Every arm's figures are kept side by side in genrm_service.json, its lines in genrm_service.log.

    lost, doubled          uids without a verdict, and verdicts too many, under the faults
    p50_ms, p99_ms         that a client waited for a verdict, under the faults
    throughput_over_vllm   tokens/s through the service over plain vLLM's
    added_step_share       a step's time with the judge over that without, less 1: the best split of memory
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rltk.files import write_json, write_text
from rltk.manifest import versions

QUOTED = {
    "faults": ("lost", "doubled", "p50_ms", "p99_ms"),
    "throughput": ("throughput_over_vllm",),
    "step": ("added_step_share",),
}
HEAD = "== "  # of an arm's part of the log


def merged(arms: dict[str, Any], name: str, section: dict[str, Any]) -> dict[str, Any]:
    """The figures of every arm, this one's anew, and what is quoted of each."""
    arms = {**arms, name: section}
    quoted = {key: arms[arm]["figures"][key] for arm, keys in QUOTED.items() if arm in arms for key in keys}
    return {**quoted, "arms": arms}


def merged_log(text: str, name: str, lines: list[str]) -> str:
    parts = {part.partition("\n")[0].split()[0]: part.rstrip() for part in ("\n" + text).split(f"\n{HEAD}")[1:]}
    parts[name] = "\n".join([name, *lines])
    return "\n\n".join(f"{HEAD}{parts[arm]}" for arm in QUOTED if arm in parts) + "\n"


def table(figures: dict[str, Any]) -> list[str]:
    """The plain numbers, a line each."""
    rows = []
    for name, value in figures.items():
        if isinstance(value, float):
            rows.append(f"{name:24}{value:12.3f}")
        elif isinstance(value, int | str) or name == "unanswered":
            rows.append(f"{name:24}{value!s:>12}")
    return rows


def hardware(device: str) -> str:
    if device == "gpu":
        import torch

        return torch.cuda.get_device_name()
    return f"{platform.machine()}, {os.cpu_count()} cores, Linux {platform.release()}"


def splits(text: str) -> list[str]:
    """`0.30:0.10,0.30:0.20`; one word, so that no key after it is taken for a split."""
    found = text.split(",")
    for split in found:
        if not re.fullmatch(r"0?\.\d+:0?\.\d+", split) or sum(map(float, split.split(":"))) >= 1:
            raise argparse.ArgumentTypeError(f"{split!r} is not two shares under 1 together, as in 0.30:0.10")
    return found


def arguments_of(words: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m bench.genrm_service", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=Path("bench/results"))
    arms = parser.add_subparsers(dest="arm", required=True)
    faults = arms.add_parser("faults")
    faults.add_argument("--seed", type=int, default=0)
    faults.add_argument("--requests", type=int, default=2000)
    faults.add_argument("--clients", type=int, default=8)
    faults.add_argument("--burst", type=int, default=160, help="questions at once; 40 have a place, 64 may wait")
    faults.add_argument("--scale", type=float, default=1.0, help="of all times; under 1 kills come closer than 60 s")
    throughput = arms.add_parser("throughput")
    throughput.add_argument("--device", choices=("cpu", "gpu"), default="gpu")
    throughput.add_argument("--model", default="smollm2", help="tiny, smollm2 or a folder")
    throughput.add_argument("--prompts", type=int, default=1024)
    throughput.add_argument("--tokens", type=int, default=256, help="of each reply")
    throughput.add_argument("--sequences", type=int, default=256)
    throughput.add_argument("--repeats", type=int, default=3)
    throughput.add_argument("--into", type=Path, help=argparse.SUPPRESS)  # in plain vLLM's and the service's processes
    throughput.add_argument("--side", choices=("vllm", "service"), help=argparse.SUPPRESS)
    step = arms.add_parser("step")
    step.add_argument("--device", choices=("cpu", "gpu"), default="gpu")
    step.add_argument("--steps", type=int, default=4, help="the first is left out of the figures")
    step.add_argument("--shares", type=splits, default=["0.30:0.20", "0.30:0.10"],
                      help="of the GPU's memory, policy's and judge's engines: 0.30:0.20,0.30:0.10")  # fmt: skip
    step.add_argument("--start", type=Path, default=Path("runs/smollm2_long"), help="GPU: the policy; made if need be")
    step.add_argument("keys", nargs="*", help="of rltk.train, for every run")
    return parser.parse_args(words)


def main(words: list[str]) -> int:
    arguments, lines = arguments_of(words), []

    def say(line: str) -> None:
        lines.append(line)
        print(line, flush=True)

    def keep(figures: dict[str, Any], wrong: Sequence[str] = ()) -> dict[str, Any]:
        return record(arguments, words, {**figures, "violations": list(wrong)}, lines)

    wrong: list[str] = []
    if arguments.arm == "faults":
        from bench import genrm_faults

        figures, wrong = genrm_faults.run(
            arguments.seed, arguments.requests, arguments.clients, arguments.burst, arguments.scale, say
        )
    elif arguments.arm == "throughput":
        from bench import genrm_throughput

        if arguments.side:
            genrm_throughput.SIDES[arguments.side](arguments)
            return 0
        figures = genrm_throughput.run(arguments, words, say)
    else:
        from bench import genrm_step

        figures = genrm_step.run(arguments, say, keep)
    for line in [*table(figures), *(f"VIOLATED  {one}" for one in wrong)]:
        say(line)
    line = keep(figures, wrong)
    quoted = {key: value for key, value in line["figures"].items() if key != "arms"}
    print(json.dumps({**line, "figures": {**quoted, "violations": wrong}}))
    return 1 if wrong else 0


def record(arguments: argparse.Namespace, words: list[str], figures: dict[str, Any], lines: list[str]) -> Any:
    """Write this arm's figures and lines beside the others'."""
    command = f"python -m bench.genrm_service {' '.join(words)}"
    section = {
        "hardware": hardware(getattr(arguments, "device", "cpu")), "versions": versions(), "command": command,
        "figures": figures,
    }  # fmt: skip
    path = arguments.out / "genrm_service.json"
    arms = json.loads(path.read_text())["figures"]["arms"] if path.exists() else {}
    line = {"bench": "genrm_service", **section, "figures": merged(arms, arguments.arm, section)}
    write_json(path, line)
    log = path.with_suffix(".log")
    head = [f"{section['hardware']}: {command}", *lines]
    write_text(log, merged_log(log.read_text() if log.exists() else "", arguments.arm, head))
    return line


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
