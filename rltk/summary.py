"""What `summary.json` says of a run, gathered step by step; part of every checkpoint, so that it survives a resume."""

from __future__ import annotations

import time
from typing import Any

from rltk.config import Config
from rltk.time_ledger import STAGES

# Averaged over the run's steps; "clip" and "log_rho" show whether the objective really was at work.
AVERAGED = (
    "clip/share",
    "log_rho/sd",
    "log_ratio/sd",
    "entropy",
    "mismatch/kl",
    "mismatch/max",
    "mismatch/mean",
    "mismatch/mean/precision",
    "mismatch/mean/cache",
    "mismatch/mean/staleness",
    "mismatch/tail_per_1k",
    "mismatch/alarm",
    "grad_norm",
    "genrm/asked",
    "genrm/unknown",
    "genrm/precision",
    "genrm/recall",
    "genrm/f1",
    "overhead",
)


class Summary:
    """`evaluated` tells whether an evaluation is the best so far."""

    def __init__(self, config: Config) -> None:
        self.config = config
        self.values: dict[str, Any] = {
            "steps": 0, "tokens_sampled": 0, "tokens_trained": 0, "wall_seconds": 0.0,
            "time_ledger": dict.fromkeys((*STAGES, "other"), 0.0), "sums": {name: [0.0, 0] for name in AVERAGED},
            "initial": None, "final": None, "best": None,
        }  # fmt: skip
        self._begun = time.time()

    def evaluated(self, step: int, figures: dict[str, Any]) -> bool:
        accuracy = figures.get(f"avg@{self.config.evaluation.samples}")
        entry = {"step": step, "accuracy": accuracy, "greedy": figures.get("greedy"), "flawed": figures.get("flawed"),
                 "levels": {name: level.get(f"avg@{self.config.evaluation.samples}")
                            for name, level in figures.get("levels", {}).items()}}  # fmt: skip
        self.values["final"] = entry
        if self.values["initial"] is None:
            self.values["initial"] = entry
        best = self.values["best"]
        if accuracy is None or (best is not None and accuracy <= best["accuracy"]):
            return False
        self.values["best"] = entry
        return True

    def trained(self, row: dict[str, float], sampled: int, trained: int) -> None:
        self.values["steps"] += 1
        self.values["tokens_sampled"] += sampled
        self.values["tokens_trained"] += trained
        for name in self.values["time_ledger"]:
            self.values["time_ledger"][name] += row[f"time/{name}"]
        for name in AVERAGED:
            if name in row:  # a step may lack a metric: nothing was trained, or the objective has no such thing
                total, count = self.values["sums"].get(name, (0.0, 0))  # a checkpoint may be older than a name
                self.values["sums"][name] = [total + row[name], count + 1]

    def state(self) -> dict[str, Any]:
        """Plain JSON."""
        return {**self.values, "wall_seconds": self._wall()}

    def restore(self, state: dict[str, Any]) -> None:
        self.values = state

    def _wall(self) -> float:
        return self.values["wall_seconds"] + time.time() - self._begun

    def result(self, status: str, version: tuple[int, int], config_hash: str, ledger: dict[str, Any]) -> dict[str, Any]:
        """The whole summary, as docs describe it."""
        values = self.values
        means = {name: total / count for name, (total, count) in values["sums"].items() if count}

        def figure(which: str, name: str) -> Any:
            return None if values[which] is None else values[which][name]

        return {
            "status": status,
            "algorithm": self.config.algorithm.path or self.config.algorithm.name,
            "task": self.config.task.name,
            "model": self.config.model.name,
            "kv": self.config.kv.name,
            "kv_budget": self.config.kv.budget,
            "steps": values["steps"],
            "wall_seconds": self._wall(),
            **{f"{which}_accuracy": figure(which, "accuracy") for which in ("initial", "final", "best")},
            **{f"{which}_greedy": figure(which, "greedy") for which in ("initial", "final")},
            **{f"{which}_flawed": figure(which, "flawed") for which in ("initial", "final")},
            "final_levels": figure("final", "levels"),
            "best_step": figure("best", "step"),
            "tokens_sampled": values["tokens_sampled"],
            "tokens_trained": values["tokens_trained"],
            "tokens_dropped": values["tokens_sampled"] - values["tokens_trained"],
            "time_ledger": values["time_ledger"],
            "mismatch": {
                name.removeprefix("mismatch/"): v for name, v in means.items() if name.startswith("mismatch/")
            },
            "means": {name: value for name, value in means.items() if not name.startswith("mismatch/")},
            "ledger": ledger,
            "weight_version": list(version),
            "config_hash": config_hash,
        }
