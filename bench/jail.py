"""`python -m bench.jail [--calls 10000]`: what a call in the jail costs, and every attack on it.

Milliseconds are medians of whole calls, one at a time: a process started, confined, run, reaped. `bare_ms` is a fresh
interpreter without the jail, which `overhead_ms` is over. Then many calls from two threads: calls a second, and the
parent's memory and open files along the way. `attacks_denied` counts the attacks that harmed nothing as any user.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from rltk.files import write_json
from rltk.rollout.jail import Jail
from rltk.rollout.tools.options import JailOptions
from tests.security.attack import ATTACKS
from tests.security.table import all_attacks, held

PROGRAMS = {
    "print": "print(6 * 7)",
    "error": "1 / 0",
    "fractions": "from fractions import Fraction\nprint(sum(Fraction(1, n) for n in range(1, 100)))",
    "numpy": "import numpy\nprint(numpy.linalg.det(numpy.eye(3)))",
    "sympy": "import sympy\nx = sympy.Symbol('x')\nprint(sympy.solve(x**2 - 2, x))",
}
BARE = [sys.executable, "-P", "-s", "-S", "-B", "-c", PROGRAMS["print"]]
MIXED = ("print", "error", "fractions")  # of the many calls; every hundredth floods its output
FLOOD = "while True: print('A' * 1000)"


def milliseconds(work: Callable[[], object], repeats: int) -> list[float]:
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        work()
        times.append(1000 * (time.perf_counter() - start))
    return times


def single_calls(jail: Jail, repeats: int) -> dict[str, float]:
    def bare() -> None:
        subprocess.run(BARE, stdout=subprocess.DEVNULL, check=True)

    figures: dict[str, float] = {}
    for name, source in PROGRAMS.items():
        times = milliseconds(lambda: jail.run(source), repeats)  # noqa: B023
        figures |= {f"{name}_ms": statistics.median(times), f"{name}_p95_ms": statistics.quantiles(times, n=20)[-1]}
    figures["median_ms"] = figures.pop("print_ms")
    figures["p95_ms"] = figures.pop("print_p95_ms")
    figures["bare_ms"] = statistics.median(milliseconds(bare, repeats))
    figures["overhead_ms"] = figures["median_ms"] - figures["bare_ms"]
    return figures


def many_calls(jail: Jail, calls: int, threads: int) -> dict[str, Any]:
    """Calls a second, and memory and open files of this process at eleven points on the way."""
    sources = itertools.cycle([PROGRAMS[MIXED[n % 3]] if n % 100 else FLOOD for n in range(300)])
    points: list[dict[str, Any]] = []
    unexpected = 0
    start = time.perf_counter()
    with ThreadPoolExecutor(threads) as pool:
        for _ in range(10):
            results = list(pool.map(jail.run, itertools.islice(sources, calls // 10)))
            unexpected += sum(result.status not in ("ok", "error", "output_limit") for result in results)
            del results
            points.append({"calls": (len(points) + 1) * (calls // 10), "rss_mib": _rss_mib(), "files": _open_files()})
            print(points[-1], flush=True)
    seconds = time.perf_counter() - start
    growth = points[-1]["rss_mib"] - points[0]["rss_mib"]
    return {
        "calls": calls, "threads": threads, "calls_per_s": calls / seconds, "unexpected": unexpected,
        "rss_mib_first_tenth": points[0]["rss_mib"], "rss_mib_last": points[-1]["rss_mib"], "rss_growth_mib": growth,
        "files_first_tenth": points[0]["files"], "files_last": points[-1]["files"],
    }  # fmt: skip


def attacks() -> dict[str, Any]:
    came_to = all_attacks()
    denied = held(came_to)
    print(f"not held: {', '.join(sorted(set(ATTACKS) - set(denied))) or 'none'}")
    return {"attacks": len(ATTACKS), "attacks_denied": len(denied), "attacked_as": list(came_to)}


def _rss_mib() -> float:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 2**20


def _open_files() -> int:
    return len(os.listdir("/proc/self/fd"))


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.jail", description=__doc__)
    parser.add_argument("--repeats", type=int, default=101)
    parser.add_argument("--calls", type=int, default=10_000)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--out", type=Path, default=None)
    arguments = parser.parse_args()
    jail = Jail(JailOptions(isolation="best_effort"))
    print(f"isolation: {jail.level}")
    figures: dict[str, Any] = single_calls(jail, arguments.repeats)
    for name, value in figures.items():
        print(f"{name:20}{value:10.1f}")
    figures |= many_calls(jail, arguments.calls, arguments.threads)
    print(f"{figures['calls_per_s']:.1f} calls a second from {arguments.threads} threads")
    figures |= attacks()
    line = {
        "bench": "jail", "hardware": f"{platform.machine()}, {os.cpu_count()} cores, Linux {platform.release()}",
        "versions": {"python": platform.python_version()}, "isolation": jail.level,
        "command": f"python -m bench.jail {' '.join(sys.argv[1:])}".strip(), "figures": figures,
    }  # fmt: skip
    if arguments.out:
        write_json(arguments.out, line)
    print(json.dumps(line))
    return 0


if __name__ == "__main__":
    sys.exit(main())
