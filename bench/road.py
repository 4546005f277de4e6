"""`python -m bench.road [steps=...]`: the default run, timed end to end, and where a step's time goes.

Prints the whole time from the command to the last file, the time ledger, and the share of the steps that was spent
neither inside vLLM nor inside DeepSpeed (aim: under 10 %). Any key of `rltk.train` may follow.
"""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from rltk.manifest import versions
from rltk.time_ledger import STAGES


def main(argv: list[str]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        command = ["-m", "rltk.train", "algorithm=ctpo", *argv, f"output={folder}", "name=bench"]
        start = time.perf_counter()
        subprocess.run([sys.executable, *command], check=True, timeout=3600)
        whole = time.perf_counter() - start
        summary = json.loads((Path(folder) / "bench" / "summary.json").read_text())
        rows = [json.loads(line) for line in (Path(folder) / "bench" / "metrics.jsonl").read_text().splitlines()]
    steps, ledger = sum(r["time/step"] for r in rows), summary["time_ledger"]
    # Weighted by time: the share of all steps' seconds, not the mean of shares.
    overhead = sum(r["overhead"] * r["time/step"] for r in rows) / steps
    print(f"\nwhole command {whole:.0f} s, of which {len(rows)} steps {steps:.0f} s ({steps / len(rows):.2f} s a step)")
    for stage in (*STAGES, "other"):
        print(f"  {stage:10} {ledger[stage]:8.1f} s  {ledger[stage] / steps:6.1%}")
    print(f"  neither vLLM nor DeepSpeed: {overhead:.1%}")
    figures = {
        "wall_seconds": whole, "step_seconds": steps / len(rows), "overhead_share": overhead, "time_ledger": ledger,
        "rollout_tokens_per_s": summary["tokens_sampled"] / max(ledger["generate"], 1e-9),
        "initial_accuracy": summary["initial_accuracy"], "final_accuracy": summary["final_accuracy"],
    }  # fmt: skip
    print(json.dumps({
        "bench": "road", "hardware": f"{platform.machine()}, {os.cpu_count()} cores", "versions": versions(),
        "command": f"python -m bench.road {' '.join(argv)}".strip(), "figures": figures,
    }))  # fmt: skip


if __name__ == "__main__":
    main(sys.argv[1:])
