"""`python -m tests.gpu.kv [ARM ...]`: compressed caches on a GPU, each arm an engine in its own process, eight at once.

What tests/integration/kv_cases.py checks on a CPU - log-probs of a transformers forward under the recorded death times,
solo runs, prompt log-probs, the pool, aborts and new weights - here with the Triton kernels, CUDA graphs, both model
runners and bf16. Arms are then compared: every policy at a budget that nothing reaches with the stock cache, graphs
with eager. Prints a table and, last, one JSON line {arm: null or what is wrong}; exits with 1 if anything is. Under
four minutes; `OUT` in the environment names a folder for the logs.
"""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from tests.integration import kv_cases
from tests.integration.kv_cases import CONTEXT, POLICIES, STOCK_BLOCK, Place, Sample

AT_ONCE, ARM_SECONDS, DEADLINE = 8, 150, 225
EAGER = Place("gpu", ties=1)
# Graphs without torch.compile: seconds instead of half a minute to start.
UNCOMPILED = {"mode": 0, "cudagraph_mode": "FULL_DECODE_ONLY", "cudagraph_capture_sizes": [1, 2, 4, 8, 16]}
GRAPHS = replace(EAGER, arguments=(("compilation_config", UNCOMPILED),))
# As people run it: compiled, piecewise graphs for prompts. bf16 itself is .03 off on average, .5 at most.
BF16 = replace(
    EAGER, dtype="bfloat16", most=0.5, mean=0.03, ties=3,
    arguments=(("hf_overrides", {"head_dtype": "float32"}), ("max_num_seqs", 16)),
)  # fmt: skip


@dataclass(frozen=True)
class Arm:
    """run: what the arm's process does; against: the arm whose samples must be the same."""

    run: Callable[[Path], dict[str, Sample] | None]
    against: str | None = None
    environment: dict[str, str] = field(default_factory=dict)


def uncut(place: Place, name: str) -> dict[str, Sample]:
    """Samples at a budget that no sequence reaches; `full`: the stock cache's."""
    options = kv_cases.KVOptions(name, budget=0 if name == "full" else CONTEXT)
    with kv_cases.engine(place, options, block_size=STOCK_BLOCK) as running:
        kv_cases.kv.prove_active(running, options)
        return kv_cases.sample(running, kv_cases.some_prompts((1, 33, 100)))


def arms() -> dict[str, Arm]:
    found = {"stock": Arm(lambda tmp: uncut(EAGER, "full"))}
    for name in POLICIES:
        found[f"uncut {name}"] = Arm(lambda tmp, n=name: uncut(GRAPHS, n), against="stock")
    for name in POLICIES:
        heads = "per_kv_head" if name in ("h2o", "dapq_longflow") else "shared"
        found[f"{name} {heads}"] = Arm(lambda tmp, n=name, h=heads: kv_cases.policy(EAGER, n, h))
    found["longflow per_kv_head"] = Arm(lambda tmp: kv_cases.policy(EAGER, "longflow", "per_kv_head"))
    for name, heads in (("longflow", "shared"), ("h2o", "per_kv_head"), ("dapq", "shared"), ("streaming", "shared")):
        eager = f"{name} {heads}"
        found[f"{eager} graphs"] = Arm(lambda tmp, n=name, h=heads: kv_cases.policy(GRAPHS, n, h), against=eager)
    for name in ("longflow", "dapq"):
        run = lambda tmp, n=name: kv_cases.policy(GRAPHS, n, "shared")  # noqa: E731
        # The runners draw their random numbers differently: V1's samples are checked by themselves.
        found[f"{name} shared graphs V1"] = Arm(run, environment={"VLLM_USE_V2_MODEL_RUNNER": "0"})
        found[f"{name} bf16 compiled"] = Arm(lambda tmp, n=name: kv_cases.policy(BF16, n, "shared"))
    found["pool"] = Arm(lambda tmp: kv_cases.pool(GRAPHS, stock=False))
    found["abort, pause, weights"] = Arm(lambda tmp: kv_cases.abort_pause_and_new_weights(GRAPHS, str(tmp)))
    return found


def one(name: str, folder: Path) -> None:
    """In the arm's own process."""
    from rltk.rollout import kv

    kv_cases.set_environment()
    os.environ.update(arms()[name].environment)
    kv.register()  # the checkout need not be installed
    samples: dict[str, Any] = {}

    def case() -> None:
        found = arms()[name].run(folder) or {}
        samples.update({uid: (s.ids, s.logprobs.tolist()) for uid, s in found.items()})

    error = kv_cases.run({name: case})[name]
    (folder / "result.json").write_text(json.dumps({"error": error, "samples": samples}))


def start(name: str, root: Path, begun: float) -> dict[str, Any]:
    """Run an arm in a process; what became of it, whatever that is."""
    folder = root / name.replace(" ", "-").replace(",", "")
    folder.mkdir(parents=True, exist_ok=True)
    left = min(ARM_SECONDS, DEADLINE - (time.perf_counter() - begun))
    if left < 10:
        return {"error": "not started: out of time", "samples": {}, "seconds": 0.0}
    clock, command = time.perf_counter(), [sys.executable, "-m", "tests.gpu.kv", "--arm", name, str(folder)]
    with open(folder / "log", "w") as log:
        try:
            code = subprocess.run(command, stdout=log, stderr=subprocess.STDOUT, timeout=left).returncode
        except subprocess.TimeoutExpired:
            code = f"after {left:.0f} s without an end"
    result = {"error": f"its process ended with {code}", "samples": {}}
    with contextlib.suppress(OSError, ValueError):
        result = json.loads((folder / "result.json").read_text())
    if result["error"]:
        print(f"--- {name}\n{(folder / 'log').read_text()[-2500:]}", flush=True)
    return {**result, "seconds": time.perf_counter() - clock}


def compare(results: dict[str, dict[str, Any]], known: dict[str, Arm]) -> None:
    """Fill in the error of arms whose samples are not those of the arm they are set against."""
    for name, result in results.items():
        other = known[name].against
        if result["error"] or other is None or other not in results:
            continue
        if results[other]["error"]:
            result["error"] = f"nothing to compare with: {other} failed"
            continue
        import numpy as np

        found, expected = (
            {uid: Sample(ids, np.array(logprobs)) for uid, (ids, logprobs) in r["samples"].items()}
            for r in (result, results[other])
        )
        try:
            assert found, "no samples"
            kv_cases.assert_same(found, expected, EAGER)
        except AssertionError as error:
            result["error"] = f"is not {other}: {error}"


def main(chosen: list[str]) -> int:
    import torch

    begun, known = time.perf_counter(), arms()
    names = chosen or list(known)
    with tempfile.TemporaryDirectory() as tmp:
        root = Path(os.environ.get("OUT") or tmp)
        with ThreadPoolExecutor(AT_ONCE) as pool:
            results = dict(zip(names, pool.map(lambda name: start(name, root, begun), names), strict=True))
    compare(results, known)
    print(f"\n{torch.cuda.get_device_name()}, {time.perf_counter() - begun:.0f} s in all")
    for name, result in results.items():
        print(f"{name:32}{result['seconds']:6.0f} s  {result['error'] or 'ok'}"[:160])
    print(json.dumps({name: result["error"] for name, result in results.items()}))
    return int(any(result["error"] for result in results.values()))


if __name__ == "__main__":
    if sys.argv[1:2] == ["--arm"]:
        one(sys.argv[2], Path(sys.argv[3]))
    else:
        sys.exit(main(sys.argv[1:]))
