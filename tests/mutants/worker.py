"""Runs tests on mutated modules, one forked process for each: the slow imports are done once, before the forks.

    python -P worker.py torch hypothesis ...        in the root of a copy of the repository

A line of JSON on standard input, {"module", "path", "source", "tests", "limit"}, is answered by one on standard output,
{"outcome", "test", "output"}. The mutated source never reaches a disk: an import hook hands it out for its module, so
no stale bytecode is ever taken for it. `module` None: the tests run on the tree as it is.
"""

from __future__ import annotations

import gc
import importlib
import importlib.machinery
import importlib.util
import json
import os
import select
import signal
import sys
import tempfile
import types
from pathlib import Path

OPTIONS = ["-x", "-q", "-m", "not full", "-p", "no:cacheprovider", "-o", "addopts=", "-o", "timeout=0"]


class MutatedModule(importlib.machinery.SourceFileLoader):
    """Finds one module, and hands out another source for it."""

    def __init__(self, module: str, path: str, source: str) -> None:
        super().__init__(module, path)
        self.source, self.used = source, False

    def find_spec(self, fullname: str, path: object = None, target: object = None) -> object:
        if fullname != self.name:
            return None
        return importlib.util.spec_from_file_location(fullname, self.path, loader=self)

    def get_code(self, fullname: str) -> types.CodeType:
        self.used = True
        return compile(self.source, self.path, "exec", dont_inherit=True)


class FirstFailure:
    """The pytest plugin that remembers which test failed first, or which file could not be collected."""

    test = ""

    def pytest_runtest_logreport(self, report) -> None:
        if report.failed and not self.test:
            self.test = report.nodeid

    pytest_collectreport = pytest_runtest_logreport


def answer(job: dict) -> dict:
    """Runs a job in a fork of this process and ends it when it takes longer than `limit` seconds."""
    reader, writer = os.pipe()
    with tempfile.TemporaryFile() as printed:
        child = os.fork()
        if child == 0:
            os.dup2(printed.fileno(), 1)
            os.dup2(printed.fileno(), 2)
            try:
                os.write(writer, json.dumps(run_tests(job)).encode())
            finally:
                os._exit(0)
        os.close(writer)
        in_time = bool(select.select([reader], [], [], job["limit"])[0])
        if not in_time:
            os.kill(child, signal.SIGKILL)
        with os.fdopen(reader, "rb") as pipe:
            found = pipe.read()
        _, status = os.waitpid(child, 0)
        printed.seek(0)
        output = printed.read().decode(errors="replace")[-3000:]
    if not in_time:
        return {"outcome": "timeout", "test": "", "output": output}
    if not found:
        return {"outcome": "error", "test": "", "output": f"the process ended with status {status}\n{output}"}
    return {**json.loads(found), "output": output}


def run_tests(job: dict) -> dict:
    import pytest

    mutated = None
    if job["module"]:
        sys.dont_write_bytecode = True
        mutated = MutatedModule(job["module"], job["path"], job["source"])
        sys.meta_path.insert(0, mutated)
    failure = FirstFailure()
    code = pytest.main([*OPTIONS, *job["tests"]], plugins=[failure])
    if failure.test:
        return {"outcome": "failed", "test": failure.test}
    if code != 0:
        return {"outcome": "error", "test": f"pytest ended with {code} and no failed test"}
    if mutated is not None and not mutated.used:
        return {"outcome": "error", "test": f"{job['module']} was never imported by {' '.join(job['tests'])}"}
    root = str(Path.cwd())
    strangers = sorted(
        name for name, module in sys.modules.items()
        if name.split(".")[0] == "rltk" and not (getattr(module, "__file__", None) or root).startswith(root)
    )  # fmt: skip
    if strangers:
        return {"outcome": "error", "test": f"imported from outside the copy: {', '.join(strangers)}"}
    return {"outcome": "passed", "test": ""}


def main() -> None:
    sys.path.insert(0, str(Path.cwd()))
    for name in sys.argv[1:]:
        importlib.import_module(name)
    if torch := sys.modules.get("torch"):
        torch.set_num_threads(1)  # a pool of threads does not survive a fork
    if hypothesis := sys.modules.get("hypothesis"):
        # The same examples each time, and none made smaller once one fails: that it fails is all that is asked.
        phases = (hypothesis.Phase.explicit, hypothesis.Phase.generate)
        settings = hypothesis.settings
        settings.register_profile("mutants", database=None, derandomize=True, deadline=None, phases=phases)
        settings.load_profile("mutants")
    gc.freeze()  # what is loaded stays: no fork has to walk through it
    for line in sys.stdin:
        print(json.dumps(answer(json.loads(line))), flush=True)


if __name__ == "__main__":
    main()
