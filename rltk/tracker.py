"""What a run leaves behind for people and machines: JSONL files (the record), W&B (a follower), the console.

    run folder
      metrics.jsonl      one row a training step             {"step", "wall_time", <metric>: float, ...}
      evaluations.jsonl  one row a held-out evaluation       {"step", "wall_time", "avg@4", "greedy", "levels", ...}
      samples.jsonl      a few trajectories a step           {"step", "wall_time", "prompt", "response", "reward", ...}
      *.discarded.jsonl  rows that a resume rolled back; nothing written is ever deleted
      summary.json       written last

W&B runs in a process of its own (`rltk.wandb_follower`) that reads these files as they grow: it can neither hold up nor
end a run, and a run that is killed still leaves a well-formed W&B folder.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import os
import secrets
import signal
import string
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from rltk.config import Config
from rltk.console import Console
from rltk.files import append_jsonl, write_json, write_text
from rltk.trajectory import Record, RewardRecord, Trajectory

FILES = ("metrics", "evaluations", "samples")
WANDB_DEADLINE_S = 60.0  # for W&B to take in the last rows and close; an upload that takes longer is cut off


class Tracker:
    """Records one run. `wandb_id` continues a W&B run (None: a new one); `Tracker.wandb_id` is kept for a resume."""

    def __init__(self, run_dir: Path, config: Config, wandb_id: str | None = None):
        self.run_dir = Path(run_dir)
        self.run_dir.mkdir(parents=True, exist_ok=True)
        self.config = config
        title = "rltk" if config.kv.name == "full" else f"rltk, kv={config.kv.name} {config.kv.budget:g}"
        self.console = Console(total=config.steps, live=config.tracker.console, title=title)
        self.wandb_id = (wandb_id or _new_id()) if config.tracker.name == "wandb" else None
        self._follower: subprocess.Popen | None = None
        self._told: int | None = None  # the follower's exit code, once it was said
        self._closed = False  # no follower is started any more
        self._begun = time.time()
        for name in FILES:
            rewind(self.run_dir / f"{name}.jsonl")

    def log(self, step: int, row: dict[str, float]) -> None:
        """Record the metrics of training step `step`. A value that is not finite is written as null and named."""
        finite = {key: float(row[key]) for key in sorted(row) if math.isfinite(row[key])}
        lost = {key: None for key in sorted(row) if key not in finite}
        record = {**finite, **lost, **({"not_finite": sorted(lost)} if lost else {})}
        self._append("metrics", step, record)
        self.console.step(step, finite)
        if lost:
            self.console.message(f"step {step}: not finite: {', '.join(lost)}")

    def evaluation(self, step: int, row: dict[str, Any]) -> None:
        """Record a held-out evaluation of the weights after training step `step` (0: before training)."""
        self._append("evaluations", step, {key: value for key, value in row.items() if key != "step"})
        self.console.evaluation(step, row)

    def samples(self, step: int, rows: list[dict[str, Any]]) -> None:
        """Record sampled trajectories of training step `step`, as plain JSON types."""
        for row in rows:
            self._append("samples", step, row)

    def phase(self, name: str, done: int | None = None, total: int | None = None) -> None:
        """Say what the run is doing now. Goes to the console alone."""
        self.console.phase(name, done, total)

    def rollback(self, step: int) -> None:
        """The run goes on from the checkpoint of `step`: later rows move to *.discarded.jsonl."""
        for name in FILES:
            rewind(self.run_dir / f"{name}.jsonl", step)

    def finish(self, summary: dict[str, Any]) -> None:
        """Write summary.json and close. ValueError if a value is not finite: leave out what has no value."""
        try:
            write_json(self.run_dir / "summary.json", summary)
        finally:
            self.close()

    def close(self) -> None:
        """Give the terminal back, let W&B take in what is written (`WANDB_DEADLINE_S` at most). May be called twice."""
        self.console.close()
        self._closed = True
        follower, self._follower = self._follower, None
        if follower is None:
            return
        try:
            assert follower.stdin is not None
            follower.stdin.close()  # its sign to finish
            code = follower.wait(WANDB_DEADLINE_S)
        except (OSError, subprocess.TimeoutExpired):
            code = f"no answer within {WANDB_DEADLINE_S:.0f} s"
            _kill_group(follower)
        if code not in (0, self._told):
            self._wandb_failed(code)

    def _append(self, name: str, step: int, row: dict[str, Any]) -> None:
        append_jsonl(self.run_dir / f"{name}.jsonl", {"step": int(step), "wall_time": time.time(), **row})
        self._watch_follower()

    def _watch_follower(self) -> None:
        """Start the follower with the first row, so that a rollback comes before it; notice, once, that it died."""
        if self.wandb_id is None or self._closed:
            return
        if self._follower is None:
            try:
                self._follower = self._start_follower()
            except OSError as error:  # no memory for a process, say
                self._closed = True
                self._wandb_failed(str(error))
        elif self._follower.poll() not in (None, self._told):
            self._told = self._follower.returncode
            self._wandb_failed(self._told)

    def _start_follower(self) -> subprocess.Popen:
        settings = {
            "run_dir": str(self.run_dir.resolve()),
            "id": self.wandb_id,
            "name": self.config.name or self.run_dir.name,
            "project": self.config.tracker.project,
            "mode": self.config.tracker.mode,
            "config": dataclasses.asdict(self.config),
            "since": self._begun,  # what is older, an earlier follower has sent
        }
        with open(self.run_dir / "wandb.log", "ab") as log:
            follower = subprocess.Popen(
                [sys.executable, "-m", "rltk.wandb_follower"],
                stdin=subprocess.PIPE,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,  # Ctrl-C is for the run; its group can be ended as a whole
            )
        assert follower.stdin is not None
        with contextlib.suppress(BrokenPipeError):  # it died at once; the next row's look will tell
            os.write(follower.stdin.fileno(), json.dumps(settings).encode() + b"\n")  # far below a pipe's size: no wait
        return follower

    def _wandb_failed(self, code: int | str | None) -> None:
        self.console.message(f"W&B stopped ({code}); the JSONL files go on. See {self.run_dir / 'wandb.log'}")


def sample_row(trajectory: Trajectory, record: Record) -> dict[str, Any]:
    """One scored trajectory as a row of samples.jsonl, the form that the report shows."""
    reward = trajectory.reward or RewardRecord(None, reason="not scored")
    return {
        "prompt_id": record.id,
        "group_id": trajectory.group_id,
        "level": record.level,
        "prompt": "\n".join(message["content"] for message in record.messages),
        "response": trajectory.text,
        "answer": record.answer,
        "reward": reward.value,
        "reason": reward.reason,
        "correct": reward.correct,
        "flawed": reward.flawed,
        "first_flawed": reward.detail.get("first_flawed"),
        "tokens": trajectory.length,
        "truncated": trajectory.truncated,
        "weight_version": list(trajectory.version or ()),
    }


def rewind(path: Path, step: float = math.inf) -> None:
    """Move rows after `step`, and a last line torn by a kill, from `path` to its .discarded.jsonl sibling."""
    if not path.exists():
        return
    text = path.read_text(encoding="utf-8", errors="replace")
    kept, discarded = [], []
    for line in filter(None, text.split("\n")):
        (kept if _step_of(line, torn=math.nan) <= step else discarded).append(line)
    if not discarded and text.endswith("\n"):
        return
    with open(path.with_suffix(".discarded.jsonl"), "a", encoding="utf-8") as stream:
        stream.writelines(line + "\n" for line in discarded)
        stream.flush()
        os.fsync(stream.fileno())  # safe there before it goes here: a kill between the two leaves it twice, not never
    write_text(path, "".join(line + "\n" for line in kept))


def _step_of(line: str, torn: float) -> float:
    try:
        return json.loads(line)["step"]
    except (ValueError, KeyError, TypeError):
        return torn  # NaN is below nothing


def _new_id() -> str:
    return "".join(secrets.choice(string.ascii_lowercase + string.digits) for _ in range(8))


def _kill_group(process: subprocess.Popen) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
