"""`python -m bench.kv_kvpress --python <its interpreter>`: does our snapkv keep what NVIDIA's kvpress keeps?

On the same prompts, model and settings (window 32, average pool 5, no sinks, fp32): the share of the tokens kept by
kvpress's SnapKVPress that ours keeps too, per layer and KV head. kvpress needs an older transformers, so it has an
environment of its own, which is made once:

    python3.11 -m venv ~/.cache/kvpress-venv
    ~/.cache/kvpress-venv/bin/pip install --no-deps torch==2.13.0
    ~/.cache/kvpress-venv/bin/pip install kvpress==0.5.5 transformers==5.2.0 numpy==2.3.5

(torch comes first and without its dependencies, so that a CPU build brings no CUDA packages.) There this same file runs
as a script, with nothing of rltk's. Writes docs/results/kv_kvpress.json.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

WINDOW, POOL = 32, 5
LENGTHS = (512, 768, 1024, 1280, 1536)
SHARES = (0.06, 0.12, 0.25, 0.5)
EACH = 4  # prompts a length: two with a needle, two of running text
DEADLINE_S = 3600


def by_kvpress(job: dict[str, Any]) -> dict[str, Any]:
    """Runs in kvpress's environment. kept: by prompt and share, [layers][kv heads] lists of token positions."""
    from importlib import metadata

    from kvpress import SnapKVPress
    from transformers import AutoModelForCausalLM, DynamicCache

    class Recorded(SnapKVPress):
        def compress(self, module, hidden_states, keys, values, attentions, kwargs):
            # The same choice twice: once of positions in place of values, to see which tokens it is.
            places = torch.arange(keys.shape[2], dtype=keys.dtype)[None, None, :, None].expand_as(values)
            _, chosen = super().compress(module, hidden_states, keys, places, attentions, kwargs)
            kept.append(chosen[0, :, :, 0].long().sort(-1).values.tolist())
            return super().compress(module, hidden_states, keys, values, attentions, kwargs)

    model = AutoModelForCausalLM.from_pretrained(job["model"], dtype=torch.float32).eval()
    result = []
    for number, prompt in enumerate(job["prompts"]):
        result.append([])
        for share in job["shares"]:
            kept: list[list[list[int]]] = []
            press = Recorded(compression_ratio=1 - share, window_size=job["window"], kernel_size=job["pool"])
            with torch.inference_mode(), press(model):
                model.model(torch.tensor([prompt]), past_key_values=DynamicCache())
            result[-1].append(kept)
        print(f"kvpress: prompt {number + 1} of {len(job['prompts'])}", file=sys.stderr, flush=True)
    return {"kept": result, "versions": {name: metadata.version(name) for name in ("kvpress", "transformers", "torch")}}


def compare(model: Any, prompts: list[Any], shares: tuple[float, ...], theirs: list) -> list[dict[str, Any]]:
    """A row for each prompt and share: the shared part of what both keep, its mean and least over layers and heads."""
    policy, rows = model.policies["snapkv"], []
    for (kind, prompt), by_share in zip(prompts, theirs, strict=True):
        scores = model.prefill([prompt]).scores["snapkv"]
        for share, kept in zip(shares, by_share, strict=True):
            common = []
            for layer, heads in zip(scores, kept, strict=True):
                mine = policy.choose(layer, len(heads[0]), 0, False)[0].tolist()
                common += [len(set(a) & set(b)) / len(b) for a, b in zip(mine, heads, strict=True)]
            rows.append(
                {
                    "prompt": kind, "tokens": len(prompt), "share": share, "kept": len(kept[0][0]),
                    "agreement": sum(common) / len(common), "least": min(common),
                }
            )  # fmt: skip
    return rows


def summary(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Budgets under the window apart: kvpress gives the whole window one score, so which of it stays is a matter of
    ties."""
    over = [row for row in rows if row["kept"] > WINDOW]

    def mean(some: list[dict[str, Any]]) -> float:
        return sum(row["agreement"] for row in some) / len(some)

    return {
        "agreement": mean(rows),
        "agreement_over_the_window": mean(over),
        "least_of_a_layer_and_head_over_the_window": min(row["least"] for row in over),
        "prompts": len(rows) // len(SHARES),
        "under_the_window": len(rows) - len(over),
        "by_share": {str(share): mean([row for row in rows if row["share"] == share]) for share in SHARES},
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--python", type=Path, help="of kvpress's environment")
    parser.add_argument("--there", type=Path, help=argparse.SUPPRESS)  # a job's file, in that environment
    parser.add_argument("--out", type=Path, default=Path("docs/results/kv_kvpress.json"))
    parser.add_argument("--lengths", type=int, nargs="+", default=list(LENGTHS))
    parser.add_argument("--threads", type=int, help="CPU threads; 1 on a busy machine")
    parser.add_argument("--each", type=int, default=EACH)
    asked = parser.parse_args()
    if asked.there:
        asked.there.with_suffix(".out").write_text(json.dumps(by_kvpress(json.loads(asked.there.read_text()))))
        return 0
    if asked.python is None or not asked.python.expanduser().is_file():
        sys.exit(f"--python {asked.python}: no such interpreter; make kvpress's environment first:\n{__doc__}")
    return _main(asked)


def _main(asked: argparse.Namespace) -> int:
    from bench.kv_model import StudyModel
    from bench.kv_texts import continuations, needles
    from rltk.compose import load
    from rltk.files import write_json
    from rltk.manifest import versions
    from rltk.model_folder import resolve_model
    from rltk.rollout.kv.policies.policy import build_policy

    if asked.threads:
        torch.set_num_threads(asked.threads)
    folder = resolve_model(load(["model=smollm2"])).model.path
    model = StudyModel(folder, {"snapkv": build_policy("snapkv", {"window": WINDOW, "pool": POOL})})
    prompts: list[tuple[str, list[int]]] = []
    for length in asked.lengths:
        half = asked.each // 2
        prompts += [("needle", list(s.prompt)) for s in needles(model.tokenizer, length, half, 1)]
        texts = continuations(model.tokenizer, length, 16, asked.each - half)
        prompts += [(s.source, list(s.prompt)) for s in texts]
    with tempfile.TemporaryDirectory() as scratch:
        job = Path(scratch) / "job.json"
        asked_for = {"model": folder, "prompts": [p for _, p in prompts], "shares": SHARES}
        job.write_text(json.dumps(asked_for | {"window": WINDOW, "pool": POOL}))
        command = [str(asked.python.expanduser()), str(Path(__file__).resolve()), "--there", str(job)]
        environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
        if asked.threads:
            environment["OMP_NUM_THREADS"] = str(asked.threads)
        subprocess.run(command, check=True, timeout=DEADLINE_S, env=environment)
        there = json.loads(job.with_suffix(".out").read_text())
    rows = compare(model, prompts, SHARES, there["kept"])
    figures = summary(rows)
    for row in rows:
        print(f"{row['prompt']:>10} {row['tokens']:5d} tokens, {row['share']:.0%}: {row['agreement']:.3%} the same")
    record = {
        "bench": "kv_kvpress",
        "hardware": f"{os.cpu_count()} CPU cores",
        "versions": versions(),
        "versions_there": there["versions"],
        "command": " ".join(["python -m bench.kv_kvpress", *sys.argv[1:]]).replace(str(Path.home()), "~"),
        "settings": {"window": WINDOW, "pool": POOL, "sinks": 0, "heads": "per_kv_head", "dtype": "float32"},
        "figures": figures,
    }
    write_json(asked.out, record | {"rows": rows})
    print(json.dumps(record))
    return 0


if __name__ == "__main__":
    sys.exit(main())
