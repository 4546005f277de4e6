"""Judging mutants: a copy of the tree, workers that fork, and what the tests said of each mutant."""

from __future__ import annotations

import json
import os
import queue
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

from tests.mutants.mutant import Mutant

COPIED = ("algorithms", "conf", "rewards", "rollout", "rltk", "tests", "pyproject.toml")
# Imported before the forks: what the tests need and what torch loads late. Nothing of rltk: each fork loads its own.
PRELOADED = ("pytest", "hypothesis", "yaml", "hydra", "numpy.random", "torch", "torch.distributed.tensor")
LIMIT = 180.0  # seconds for one mutant; its tests take 1 to 3 on a free core


@dataclass(frozen=True)
class Verdict:
    mutant: Mutant
    outcome: str  # killed, survived or timeout
    test: str  # the first that failed


@contextmanager
def copy_of(root: Path, names: Iterable[str] = COPIED) -> Iterator[Path]:
    """The tree as it is now, in a folder of its own: whoever edits it meanwhile disturbs nothing."""
    with tempfile.TemporaryDirectory(prefix="mutants-") as folder:
        for name in names:
            source, target = root / name, Path(folder, name)
            if source.is_dir():
                shutil.copytree(source, target, symlinks=True, ignore=shutil.ignore_patterns("__pycache__"))
            else:
                shutil.copy2(source, target)
        yield Path(folder)


class Worker:
    """One process that runs jobs, each in a fork of itself."""

    def __init__(self, root: Path, preloaded: Iterable[str]) -> None:
        # Without pytest's plugins: the tests are plain functions, and loading them takes longer than most mutants.
        script = Path(__file__).with_name("worker.py")
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}
        self.process = subprocess.Popen(
            [sys.executable, "-P", str(script), *preloaded],
            cwd=root, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        )  # fmt: skip

    def ask(self, job: dict) -> dict:
        assert self.process.stdin is not None and self.process.stdout is not None
        self.process.stdin.write(json.dumps(job) + "\n")
        self.process.stdin.flush()
        line = self.process.stdout.readline()
        if not line:
            raise RuntimeError(f"a worker ended with {self.process.wait(10)}; what it printed is above")
        return json.loads(line)

    def close(self) -> None:
        self.process.communicate(timeout=30)


def judge(
    root: Path,
    mutants: list[Mutant],
    suites_of: Callable[[str], list[str]],
    *,
    workers: int = 2,
    preloaded: Iterable[str] = PRELOADED,
) -> Iterator[Verdict]:
    """What the tests `suites_of(file)` say of each mutant, as it becomes known. `root`: a copy of the tree.

    Raises RuntimeError if the tests fail on the tree as it is, or cannot be run: then they say nothing of a mutant.
    """
    with ExitStack() as stack:
        idle: queue.SimpleQueue[Worker] = queue.SimpleQueue()
        for _ in range(workers):
            worker = Worker(root, preloaded)
            stack.callback(worker.close)
            idle.put(worker)

        def ask(tests: list[str], mutant: Mutant | None) -> dict:
            module = mutant and "rltk." + mutant.file.removesuffix(".py").replace("/", ".")
            path = mutant and str(root / "rltk" / mutant.file)
            worker = idle.get()
            try:
                source = mutant and mutant.source
                return worker.ask({"module": module, "path": path, "source": source, "tests": tests, "limit": LIMIT})
            finally:
                idle.put(worker)

        pool = ThreadPoolExecutor(workers)
        stack.callback(pool.shutdown, cancel_futures=True)
        suites = sorted({tuple(suites_of(mutant.file)) for mutant in mutants})
        for suite, answer in zip(suites, pool.map(lambda suite: ask(list(suite), None), suites), strict=True):
            if answer["outcome"] != "passed":
                raise RuntimeError(
                    f"{' '.join(suite)}: {answer['outcome']} {answer['test']} without any mutant\n{answer['output']}"
                )
        answers = pool.map(lambda mutant: ask(suites_of(mutant.file), mutant), mutants)
        for mutant, answer in zip(mutants, answers, strict=True):
            if answer["outcome"] == "error":
                raise RuntimeError(f"{mutant.name}: {answer['test']}\n{answer['output']}")
            outcome = {"failed": "killed", "passed": "survived"}.get(answer["outcome"], "timeout")
            yield Verdict(mutant, outcome, answer["test"])
