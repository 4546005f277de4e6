"""`python -m bench.genrm_attacks`: what attacks gain from the judge that ships (`reward.genrm=tiny`).

Flawed solutions of held-out arithmetic problems, each with a kind of error that the judge was trained on, plain and
dressed up by each of `rltk.rewards.genrm.attacks`, through the real service and a real engine (vLLM, CPU). Of those
that are caught when plain:

    gained    share that the attack has called sound
    escaped   share that it leaves without a verdict, also after the second question; in a run such a sample is masked,
              as is one that is too long for the judge's context (`unanswered`)

Written to docs/results/genrm_attacks.{json,log}. The judge has 1.6 M parameters and has seen arithmetic and nothing
else: any other paragraph is new to it.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import ray

from bench.genrm_parts import start_ray, start_replica, start_service
from rltk.compose import load
from rltk.files import write_json, write_text
from rltk.manifest import versions
from rltk.model_folder import resolve_model
from rltk.rewards.genrm import benchmarks
from rltk.rewards.genrm.client import GenRMClient
from rltk.rewards.genrm.engine import JudgeEngine
from rltk.rewards.genrm.harness import measure
from rltk.tasks import build_task
from rltk.tasks.planted import solve

SEED = 0


def flawed(count: int) -> Iterator[dict[str, Any]]:
    """Lines of the benchmark `attacks`: `count` problems of task=judging's held-out side, an error each."""
    task: Any = build_task(load(["task=judging"]).task)
    rng = random.Random(SEED)
    for problem in task.arithmetic.held_out(10 * count):
        text = solve(problem, rng.choice(task.styles), rng)
        found = task.arithmetic.score(problem, text)
        if count and found.flawed and found.correct:  # only a right answer is asked about
            count -= 1
            asked = {"problem": problem.messages[-1]["content"], "reference": problem.answer, "response": text}
            yield {"id": problem.id, **asked, "flawed": True}


def main(words: list[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m bench.genrm_attacks", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=Path("docs/results"))
    parser.add_argument("--solutions", type=int, default=60)
    arguments = parser.parse_args(words)
    options = resolve_model(load(["algorithm=fapo", "reward.genrm=tiny"])).reward.genrm
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "flawed.jsonl"
        file.write_text("".join(f"{json.dumps(row)}\n" for row in flawed(arguments.solutions)))
        rows = benchmarks.load("attacks", file)
    start_ray(2)
    try:
        service = start_service(options, [start_replica(JudgeEngine, options, "cpu")])
        ray.get(service.ready.remote(), timeout=options.start_s)
        figures = asyncio.run(measure("attacks", rows, GenRMClient(service, options, "bench")))
    finally:
        ray.shutdown()
    lines = [f"{name:20}{figures[name]}" for name in ("caught", "gained", "escaped", "asked", "unanswered")]
    lines += [f"  {name:20}gained {_shown(part['gained'])}  escaped {_shown(part['escaped'])}"
              for name, part in figures["by_attack"].items()]  # fmt: skip
    print("\n".join(lines))
    command = f"python -m bench.genrm_attacks {' '.join(words)}".strip()
    write_json(arguments.out / "genrm_attacks.json",
               {"bench": "genrm_attacks", "command": command, "versions": versions(), "figures": figures})  # fmt: skip
    write_text(arguments.out / "genrm_attacks.log", "\n".join([f"$ {command}", *lines]) + "\n")
    return 0


def _shown(share: float | None) -> str:
    return " none" if share is None else f"{share:.3f}"  # none: too long for the judge's context, every one


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
