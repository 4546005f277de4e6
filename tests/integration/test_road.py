"""The road as a user takes it: the entry point, its files, its exits, a kill and a resume."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from tests.integration.places import ROOT

DEADLINE = 400  # seconds for one run; a hang is a failure, not a wait
SMALL = ["tracker=none", "batch.prompts=4", "batch.samples=4", "evaluation.problems=4", "evaluation.samples=2"]


def start(*arguments: str) -> subprocess.Popen:
    command = [sys.executable, "-u", "-m", "rltk.train", *arguments]
    return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def finish(process: subprocess.Popen) -> tuple[int, str]:
    out, _ = process.communicate(timeout=DEADLINE)
    return process.returncode, out


def rows(folder: Path, name: str = "metrics") -> list[dict]:
    return [json.loads(line) for line in (folder / f"{name}.jsonl").read_text().splitlines()]


def timeless(row: dict) -> dict:
    """What must not depend on the machine's speed."""
    timed = ("time/", "tokens_per_s/", "wall_time", "overhead", "dropped/reissued")
    return {name: value for name, value in row.items() if not name.startswith(timed)}


def left_after(processes, seconds: float) -> list[str]:
    """Names of the processes that are still there. Ray's own agents, which hold nothing of ours, do not count: they
    notice by polling that their node is gone, and may take over a minute."""
    until = time.monotonic() + seconds
    while True:
        names = []
        for process in processes:
            with contextlib.suppress(psutil.NoSuchProcess):
                if process.status() != psutil.STATUS_ZOMBIE:
                    names.append(process.name())
        names = [name for name in names if name not in ("ray::RuntimeEnvAgent", "ray::DashboardAgent")]
        if not names or time.monotonic() > until:
            return names
        time.sleep(0.2)


def read_until(process: subprocess.Popen, text: str, times: int = 1) -> None:
    assert process.stdout is not None
    seen = []
    for line in process.stdout:
        seen.append(line)
        times -= text in line
        if times == 0:
            return
    pytest.fail(f"the run ended before it printed {text!r}:\n{''.join(seen)}")


def test_a_run_leaves_what_it_promises(tmp_path):
    """learner.ranks=2, W&B offline, a user's own reward function; the model folder loads in transformers."""
    (tmp_path / "my_reward.py").write_text(
        "def score(trajectory, record):\n    return float(len(trajectory.text) % 2)\n"
    )
    environment = {**os.environ, "PYTHONPATH": f"{tmp_path}:{os.environ.get('PYTHONPATH', '')}"}
    command = [sys.executable, "-m", "rltk.train", "experiment=smoke", "learner.ranks=2", "reward=my_reward:score",
               "correction=tis", f"output={tmp_path}", "name=run"]  # fmt: skip
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=DEADLINE)
    assert done.returncode == 0, done.stdout + done.stderr
    folder = tmp_path / "run"
    for name in (
        "config.yaml",
        "manifest.json",
        "metrics.jsonl",
        "samples.jsonl",
        "summary.json",
        "report.html",
        "model",
    ):
        assert (folder / name).exists(), name
    assert list((folder / "wandb").glob("offline-run-*"))
    summary = json.loads((folder / "summary.json").read_text())
    assert (summary["status"], summary["steps"], summary["weight_version"]) == ("finished", 2, [0, 2])
    assert summary["ledger"]["issued"] == summary["ledger"]["trained"] == 32
    for row in rows(folder):
        parts = sum(row[f"time/{s}"] for s in ("generate", "reward", "logprobs", "train", "sync", "evaluate", "other"))
        assert parts == pytest.approx(row["time/step"], rel=1e-6)
        assert row["grad_norm"] > 0 and row["probe/max"] < 1e-4 and row["mismatch/max"] < 1e-3
        assert row["entropy"] > 0 and row["clip/share"] > 0 and 0 <= row["reward/constant_groups"] <= 1
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model, tokenizer = (
        AutoModelForCausalLM.from_pretrained(folder / "model"),
        AutoTokenizer.from_pretrained(folder / "model"),
    )
    assert sum(p.numel() for p in model.parameters()) > 0 and tokenizer.chat_template

    # vLLM loads it too, and an evaluation of it says what a user asks for.
    command = [sys.executable, "-m", "rltk.evaluate", f"model={folder / 'model'}", "samples=4", "problems=5"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=DEADLINE)
    assert done.returncode == 0, done.stdout + done.stderr
    figures = json.loads(done.stdout.splitlines()[-1])
    assert figures["problems"] == 5 and figures["samples"] == 4
    for name in ("avg@4", "pass@1", "pass@2", "pass@4", "greedy"):
        low, high = figures[f"{name}_ci"]
        assert 0 <= low <= figures[name] <= high <= 1


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """An undisturbed run: (its folder, the arguments that made it)."""
    output = tmp_path_factory.mktemp("whole")
    arguments = [*SMALL, "steps=4", "checkpoint.every=1", "evaluation.every=2"]
    code, out = finish(start(*arguments, f"output={output}", "name=whole"))
    assert code == 0, out
    return output / "whole", arguments


def assert_same_run(one: Path, other: Path) -> None:
    assert [row["step"] for row in rows(other)] == [1, 2, 3, 4]
    for a, b in zip(rows(one), rows(other), strict=True):
        assert timeless(a) == timeless(b)
    assert [timeless(row) for row in rows(one, "evaluations")] == [timeless(row) for row in rows(other, "evaluations")]


@pytest.mark.parametrize(
    "points", [("3:commit",), pytest.param(("2:generate", "3:sync", "3:commit"), marks=pytest.mark.full)]
)
def test_killed_and_resumed_it_is_the_same_run(whole, tmp_path, points):
    """kill -9 while sampling, between training and sync, and with a checkpoint half written; the metrics equal an
    uninterrupted run's."""
    folder, arguments = whole
    arguments = [*arguments, f"output={tmp_path}", "name=cut", "resume=auto"]
    for point in points:
        process = start(*arguments, f"debug.die_at={point}")
        children: set[psutil.Process] = set()
        while process.poll() is None:
            with contextlib.suppress(psutil.NoSuchProcess):
                children |= set(psutil.Process(process.pid).children(recursive=True))
            time.sleep(0.2)
        assert process.returncode == -signal.SIGKILL, process.stdout.read() if process.stdout else ""
        assert not left_after(children, 60), "processes of a killed run are left"
    code, out = finish(start(*arguments))
    assert code == 0, out
    assert_same_run(folder, tmp_path / "cut")
    summaries = [json.loads((path / "summary.json").read_text()) for path in (folder, tmp_path / "cut")]
    assert summaries[0]["ledger"] == summaries[1]["ledger"]
    assert summaries[0]["tokens_sampled"] == summaries[1]["tokens_sampled"]
    assert summaries[1]["weight_version"][0] > 0  # another incarnation

    # The same folder with another learning rate is not the same run.
    code, out = finish(start(*arguments, "learner.lr=1e-3"))
    assert code == 2 and "learner.lr" in out, out


@pytest.mark.full
def test_an_engine_may_die_and_the_run_does_not_notice(whole, tmp_path):
    """The engine's process is killed twice; a new one joins at the current version, and the numbers stay the same."""
    folder, arguments = whole
    process = start(*arguments, f"output={tmp_path}", "name=died")
    for line in ("step 1/", "step 3/"):
        read_until(process, line)
        engines = [c for c in psutil.Process(process.pid).children(recursive=True) if "EngineActor" in c.name()]
        assert len(engines) == 1, engines
        engines[0].kill()
    code, out = finish(process)
    assert code == 0, out
    assert "replacing dead engines" in out
    assert_same_run(folder, tmp_path / "died")


def test_an_interrupt_leaves_a_checkpoint_and_no_process(tmp_path):
    process = start(*SMALL, "steps=50", "checkpoint.every=0", "evaluation.every=0", f"output={tmp_path}", "name=run")
    read_until(process, "step 1/")
    children = psutil.Process(process.pid).children(recursive=True)
    begun = time.monotonic()
    process.send_signal(signal.SIGINT)
    code, out = finish(process)
    assert code == 130, out
    assert not left_after(children, 60)
    steps = sorted(int(path.name[-6:]) for path in (tmp_path / "run" / "checkpoints").iterdir())
    assert steps[-1] >= 1 and steps[-1] == rows(tmp_path / "run")[-1]["step"], (steps, time.monotonic() - begun)
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["status"] == "interrupted"
