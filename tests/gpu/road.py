"""`python -m tests.gpu.road`: three training steps on one GPU, engine and learner sharing it, as a user would run them.

Two arms: the default precision (fp32), and bf16 with CUDA graphs. Each must finish, move the weights, pass checksum and
probe after every sync (a mismatch ends a run), and keep sampler and learner as close as the precision allows. Prints a
table, and a JSON line last; `OUT` in the environment names a folder for the logs.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

STEPS = 3
COMMON = [
    "algorithm=ctpo",
    f"steps={STEPS}",
    "evaluation.every=0",
    "evaluation.problems=32",
    "tracker=none",
    "cluster.device=gpu",
]
ARMS = {
    "fp32": ([], 1e-4),
    "bf16": (["rollout.dtype=bfloat16", "learner.dtype=bfloat16", "rollout.enforce_eager=false"], 0.03),
}


def run(name: str, settings: list[str], folder: Path) -> dict:
    """One arm: its summary, its rows, its log."""
    log = Path(os.environ.get("OUT", folder)) / f"road-{name}.log"
    command = [sys.executable, "-m", "rltk.train", *COMMON, *settings, f"name={name}", f"output={folder}"]
    start = time.perf_counter()
    with open(log, "w") as out:
        code = subprocess.run(command, stdout=out, stderr=subprocess.STDOUT, timeout=420).returncode
    if code != 0:
        sys.exit(f"{' '.join(command)} ended with {code}:\n{log.read_text()[-6000:]}")
    rows = [json.loads(line) for line in (folder / name / "metrics.jsonl").read_text().splitlines()]
    return {"summary": json.loads((folder / name / "summary.json").read_text()), "rows": rows,
            "seconds": time.perf_counter() - start}  # fmt: skip


def _moved(folder: Path) -> float:
    """How far the furthest weight is from the model that the run began with."""
    from safetensors.torch import load_file

    import rltk

    before = load_file(Path(rltk.__file__).parent / "models" / "tiny" / "model.safetensors")
    after = load_file(folder / "model.safetensors")
    return max((after[name].float() - before[name].float()).abs().max().item() for name in after)


def main() -> None:
    import torch

    figures = {}
    heads = ("whole run", "a step", "sync", "probe mean", "probe max", "KL", "tokens/s")
    print(f"{'arm':6}" + "".join(f"{head:>12}" for head in heads))
    with tempfile.TemporaryDirectory() as folder:
        for name in sys.argv[1:] or ARMS:
            settings, allowed = ARMS[name]
            done = run(name, settings, Path(folder))
            rows, summary = done["rows"], done["summary"]
            assert summary["status"] == "finished" and [r["step"] for r in rows] == [1, 2, 3], summary
            assert summary["weight_version"][1] == STEPS, summary
            assert all(r["grad_norm"] > 0 for r in rows), "no gradient"
            assert _moved(Path(folder) / name / "model") > 1e-6, "the weights are those it began with"
            worst = max(r["probe/mean"] for r in rows)
            assert worst <= allowed, f"{name}: probe mean {worst} over {allowed}"
            last = rows[-1]
            figures[name] = {
                "seconds": done["seconds"],
                "step_s": last["time/step"],
                "sync_s": last["time/sync"],
                "probe_mean": worst,
                "probe_max": max(r["probe/max"] for r in rows),
                "kl": last["mismatch/kl"],
                "rollout_tokens_per_s": last["tokens_per_s/rollout"],
            }
            print(f"{name:6}" + "".join(f"{value:>12.3g}" for value in figures[name].values()), flush=True)
    command = f"python -m tests.gpu.road {' '.join(sys.argv[1:])}".strip()
    print(
        json.dumps(
            {"bench": "gpu_road", "hardware": torch.cuda.get_device_name(), "command": command, "figures": figures}
        )
    )


if __name__ == "__main__":
    main()
