"""The process that copies a run's JSONL files into W&B. Started by `rltk.tracker`, which never waits for it.

Reads one line of settings from standard input, then follows the files until standard input closes: that is the run's
end, be it by `Tracker.close` or by a kill of the run. Rows that a resume rolled back stay in W&B beside the new ones:
the JSONL files are the record.
"""

from __future__ import annotations

import json
import os
import select
import sys
import threading
from pathlib import Path
from typing import Any

POLL_S = 0.5
CLOSE_S = 55.0  # below the tracker's deadline; it also ends this process when the run was killed


class Follower:
    """New rows of one JSONL file, from any point in its life: rows not younger than the last one given are skipped."""

    def __init__(self, path: Path, since: float):
        self.path, self.since = path, since
        self.inode, self.offset = None, 0

    def rows(self) -> list[dict[str, Any]]:
        if not self.path.exists():
            return []
        with open(self.path, "rb") as stream:
            inode = os.fstat(stream.fileno()).st_ino
            if inode != self.inode:  # replaced by a rollback: read again, `since` skips what was sent
                self.inode, self.offset = inode, 0
            stream.seek(self.offset)
            data = stream.read()
        whole = data[: data.rfind(b"\n") + 1]
        self.offset += len(whole)
        parsed = (json.loads(line) for line in whole.splitlines())
        fresh = [row for row in parsed if row["wall_time"] > self.since]
        self.since = max([self.since, *(row["wall_time"] for row in fresh)])
        return fresh


def main() -> None:
    settings = json.loads(sys.stdin.buffer.readline())
    folder = Path(settings["run_dir"])
    run = _open(settings)
    followers = {
        name: Follower(folder / f"{name}.jsonl", settings["since"]) for name in ("metrics", "evaluations", "samples")
    }
    ended = False
    while not ended:
        ended = bool(select.select([sys.stdin], [], [], POLL_S)[0])  # readable means closed: nothing more is sent
        for name, follower in followers.items():
            _send(run, name, follower.rows())
    # Closing can wait for a network that is gone for ever; the local files are complete by then.
    timer = threading.Timer(CLOSE_S, os._exit, args=(3,))
    timer.daemon = True
    timer.start()
    summary = folder / "summary.json"
    if summary.exists():
        run.summary.update(json.loads(summary.read_text()))
    run.finish(exit_code=0 if summary.exists() else 1)
    timer.cancel()


def _open(settings: dict[str, Any]) -> Any:
    import wandb

    run = wandb.init(
        project=settings["project"],
        name=settings["name"],
        id=settings["id"],
        resume="allow",
        mode=settings["mode"],
        dir=settings["run_dir"],
        config=settings["config"],
        settings=wandb.Settings(console="off", disable_git=True, save_code=False, x_stats_pid=os.getppid()),
    )
    # Rows carry their own step: W&B's counter would refuse evaluations and samples, which come after their step's row.
    run.define_metric("step", hidden=True)
    run.define_metric("*", step_metric="step")
    return run


def _send(run: Any, name: str, rows: list[dict[str, Any]]) -> None:
    if not rows:
        return
    if name == "samples":
        import wandb

        columns = sorted({key for row in rows for key in row})
        table = wandb.Table(columns=[*columns], data=[[_cell(row.get(key)) for key in columns] for row in rows])
        run.log({"step": rows[-1]["step"], "samples": table})
        return
    prefix = "held_out/" if name == "evaluations" else ""
    for row in rows:
        numbers = {prefix + key: value for key, value in _flat(row).items() if key not in ("step", "wall_time")}
        run.log({"step": row["step"], **numbers})


def _flat(row: dict[str, Any], prefix: str = "") -> dict[str, float]:
    """Numbers of nested rows under joined names; an interval's two ends become /0 and /1."""
    flat: dict[str, float] = {}
    for key, value in row.items():
        if isinstance(value, list):
            value = {str(index): item for index, item in enumerate(value)}
        if isinstance(value, dict):
            flat.update(_flat(value, f"{prefix}{key}/"))
        elif isinstance(value, int | float):
            flat[f"{prefix}{key}"] = value
    return flat


def _cell(value: Any) -> Any:
    return value if isinstance(value, str | int | float | bool | None) else json.dumps(value)


if __name__ == "__main__":
    main()
