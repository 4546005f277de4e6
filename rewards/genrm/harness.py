"""How good is a judge?

    python -m rltk.rewards.genrm.harness --benchmark processbench --url http://host:8000/v1 --model NAME [FILE ...]

Asks an OpenAI-compatible server (`vllm serve ...`) through the service: with its retries, deadlines and cache. Without
a file: our own few examples, which show the format and that all is wired, not how good the judge is. Prints a table for
people and, last, one JSON line. `measure` is the same for a service of your own.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import shlex
import sys
from collections.abc import Awaitable, Callable, Sequence
from typing import Any, Protocol, TypeVar

from rltk.errors import ConfigError, RltkError
from rltk.rewards.genrm import benchmarks
from rltk.rewards.genrm.options import GenRMOptions
from rltk.rewards.genrm.types import Comparison, Question, Verdict

JUDGES = {"rewardbench": "best_of_n"}  # the others: fapo
Asked = TypeVar("Asked")
Answer = TypeVar("Answer")


class Service(Protocol):
    """Of `GenRMService` or `GenRMClient`, what is needed here."""

    async def judge(self, questions: Sequence[Question]) -> list[Verdict]: ...

    async def compare(self, problem: str, responses: Sequence[str]) -> Comparison: ...


async def measure(benchmark: str, rows: Sequence[Any], service: Service, at_once: int = 64) -> dict[str, Any]:
    """The benchmark's figures (see `benchmarks`) of `rows` as `benchmarks.load` gives them, `at_once` under way."""
    if benchmark == "rewardbench":
        comparisons = await _each(rows, lambda c: service.compare(c.problem, c.responses), at_once)
        return benchmarks.contest_figures(rows, comparisons)

    async def judge(solution: benchmarks.Solution) -> Verdict:
        return (await service.judge([solution.question]))[0]

    verdicts = await _each(rows, judge, at_once)
    if benchmark == "attacks":
        return benchmarks.attack_figures(rows, verdicts)
    if benchmark == "flawed_positive":
        return benchmarks.flaw_figures(rows, verdicts)
    if any(v.value is not None and "index" not in v.detail for v in verdicts):
        raise ConfigError("processbench asks which paragraph is wrong: give it the judge fapo, or one like it")
    return benchmarks.process_figures(rows, verdicts)


async def _each(rows: Sequence[Asked], ask: Callable[[Asked], Awaitable[Answer]], at_once: int) -> list[Answer]:
    places = asyncio.Semaphore(at_once)

    async def one(row: Asked) -> Answer:
        async with places:
            return await ask(row)

    return list(await asyncio.gather(*(one(row) for row in rows)))


def main(argv: list[str]) -> None:
    arguments = _arguments(argv)
    rows = [row for file in arguments.files or [None] for row in benchmarks.load(arguments.benchmark, file)]
    options = GenRMOptions(
        name="harness",
        judge=arguments.judge or JUDGES.get(arguments.benchmark, "fapo"),
        judge_options=_judge_options(arguments.judge_options),
        url=arguments.url,
        model=arguments.model,
        key_env=arguments.key_env,
        max_sequences=arguments.at_once,
        deadline_s=arguments.deadline_s,
        attempt_s=arguments.deadline_s / 2,
    )
    figures = asyncio.run(_measured(arguments.benchmark, rows, options))
    for name, value in figures.items():
        if not isinstance(value, dict):
            print(f"{name:<16}{_shown(value)}")
    for name, part in (figures.get("subsets") or figures.get("by_attack") or {}).items():
        words = _shown(part) if not isinstance(part, dict) else "  ".join(f"{k} {_shown(v)}" for k, v in part.items())
        print(f"  {name:<22}{words}")
    command = f"python -m rltk.rewards.genrm.harness {shlex.join(argv)}"
    print(
        json.dumps({"benchmark": arguments.benchmark, "judge": options.judge, "command": command, "figures": figures})
    )


async def _measured(benchmark: str, rows: Sequence[Any], options: GenRMOptions) -> dict[str, Any]:
    from rltk.rewards.genrm.service import GenRMService  # only here: `measure` is free of what a service needs

    service = GenRMService(options)
    try:
        await service.ready()
        return await measure(benchmark, rows, service, options.max_sequences)
    finally:
        await service.close()


def _arguments(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m rltk.rewards.genrm.harness", description="How good is a judge?")
    parser.add_argument("--benchmark", required=True, choices=benchmarks.BENCHMARKS)
    parser.add_argument("--url", required=True, help="an OpenAI-compatible server, as http://host:8000/v1")
    parser.add_argument("--model", required=True, help="the model's name there")
    parser.add_argument("--key-env", default="OPENAI_API_KEY", help="the environment variable that holds its key")
    parser.add_argument("--judge", help="fapo (rewardbench: best_of_n), any other, or module:Class")
    parser.add_argument("--judge-options", default="{}", help='JSON, as {"max_tokens": 8192}')
    parser.add_argument("--at-once", type=int, default=64, help="questions under way")
    parser.add_argument("--deadline-s", type=float, default=600.0, help="of one question")
    parser.add_argument("files", nargs="*", help="JSON lines; none: our own examples")
    arguments = parser.parse_args(argv)
    if arguments.at_once < 1 or not arguments.deadline_s > 0:
        parser.error("--at-once must be at least 1, and --deadline-s above 0")
    return arguments


def _judge_options(text: str) -> dict[str, Any]:
    try:
        options = json.loads(text)
    except ValueError as error:
        raise ConfigError(f"--judge-options {text!r} is not JSON: {error}") from None
    if not isinstance(options, dict):
        raise ConfigError(f"--judge-options {text!r} is not an object of options")
    return options


def _shown(value: Any) -> str:
    return "-" if value is None else f"{value:.3f}" if isinstance(value, float) else str(value)


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except RltkError as error:
        print(f"rltk: {error}", file=sys.stderr)
        sys.exit(2 if isinstance(error, ConfigError) else 1)
