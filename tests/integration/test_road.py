"""The road as a user takes it: the entry point, its files, its exits, a kill and a resume."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator
from pathlib import Path

import psutil
import pytest

from tests.integration.places import ROOT

DEADLINE = 300  # seconds for one run; a hang is a failure, not a wait
SMALL = ["tracker=none", "batch.prompts=4", "batch.samples=4", "evaluation.problems=4", "evaluation.samples=2"]


def allow(runs: int) -> pytest.MarkDecorator:
    """Time for a test of so many runs, those of its fixtures included: each is ended by its own deadline first."""
    return pytest.mark.timeout(runs * DEADLINE + 60)


@contextlib.contextmanager
def started(*arguments: str, module: str = "rltk.train", path: Path | None = None) -> Iterator[subprocess.Popen]:
    """A process of an entry point, `path` on its Python path. With the block it ends, and all that it started."""
    paths = [str(path)] if path else []
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([*paths, os.environ.get("PYTHONPATH", "")])}
    command = [sys.executable, "-u", "-m", module, *arguments]
    process = subprocess.Popen(
        command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    try:
        yield process
    finally:
        if process.poll() is None:
            kill([*psutil.Process(process.pid).children(recursive=True), process])
            process.wait(30)
        assert process.stdout is not None
        process.stdout.close()


def kill(processes: Iterable[psutil.Process | subprocess.Popen]) -> None:
    for process in processes:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()


def finish(process: subprocess.Popen) -> tuple[int, str]:
    out, _ = process.communicate(timeout=DEADLINE)
    return process.returncode, out


def run(*arguments: str, module: str = "rltk.train", path: Path | None = None) -> tuple[int, str]:
    """(exit code, output)"""
    with started(*arguments, module=module, path=path) as process:
        return finish(process)


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


@allow(2)
def test_a_run_leaves_what_it_promises(tmp_path):
    """learner.ranks=2, W&B offline, a user's own reward function; the model folder loads in transformers."""
    (tmp_path / "my_reward.py").write_text(
        "def score(trajectory, record):\n    return float(len(trajectory.text) % 2)\n"
    )
    keys = ["experiment=smoke", "learner.ranks=2", "reward=my_reward:score", "correction=tis"]
    code, out = run(*keys, f"output={tmp_path}", "name=run", path=tmp_path)
    assert code == 0, out
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
    code, out = run(f"model={folder / 'model'}", "samples=4", "problems=5", module="rltk.evaluate")
    assert code == 0, out
    figures = json.loads(out.splitlines()[-1])
    assert figures["problems"] == 5 and figures["samples"] == 4
    for name in ("avg@4", "pass@1", "pass@2", "pass@4", "greedy"):
        low, high = figures[f"{name}_ci"]
        assert 0 <= low <= figures[name] <= high <= 1


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """An undisturbed run: (its folder, the arguments that made it)."""
    output = tmp_path_factory.mktemp("whole")
    arguments = [*SMALL, "steps=4", "checkpoint.every=1", "evaluation.every=2"]
    code, out = run(*arguments, f"output={output}", "name=whole")
    assert code == 0, out
    return output / "whole", arguments


def assert_same_run(one: Path, other: Path) -> None:
    assert [row["step"] for row in rows(other)] == [1, 2, 3, 4]
    for a, b in zip(rows(one), rows(other), strict=True):
        assert timeless(a) == timeless(b)
    assert [timeless(row) for row in rows(one, "evaluations")] == [timeless(row) for row in rows(other, "evaluations")]


@allow(6)
@pytest.mark.parametrize(
    "points", [("3:commit",), pytest.param(("2:generate", "3:sync", "3:commit"), marks=pytest.mark.full)]
)
def test_killed_and_resumed_it_is_the_same_run(whole, tmp_path, points):
    """kill -9 while sampling, between training and sync, and with a checkpoint half written; the metrics equal an
    uninterrupted run's."""
    folder, arguments = whole
    arguments = [*arguments, f"output={tmp_path}", "name=cut", "resume=auto"]
    for point in points:
        dies_at(point, *arguments)
    code, out = run(*arguments)
    assert code == 0, out
    assert_same_run(folder, tmp_path / "cut")
    summaries = [json.loads((path / "summary.json").read_text()) for path in (folder, tmp_path / "cut")]
    assert summaries[0]["ledger"] == summaries[1]["ledger"]
    assert summaries[0]["tokens_sampled"] == summaries[1]["tokens_sampled"]
    assert summaries[1]["weight_version"] == [len(points), 4]  # another incarnation each time

    # The same folder with another learning rate is not the same run.
    code, out = run(*arguments, "learner.lr=1e-3")
    assert code == 2 and "learner.lr" in out, out


def dies_at(point: str, *arguments: str, path: Path | None = None) -> None:
    """Run until it kills itself there, and see that nothing of it is left."""
    children: set[psutil.Process] = set()
    with started(*arguments, f"debug.die_at={point}", path=path) as process:
        until = time.monotonic() + DEADLINE
        while process.poll() is None and time.monotonic() < until:
            with contextlib.suppress(psutil.NoSuchProcess):
                children |= set(psutil.Process(process.pid).children(recursive=True))
            time.sleep(0.2)
        assert process.returncode == -signal.SIGKILL, process.stdout.read() if process.returncode else "it hangs"
    try:
        assert not left_after(children, 60), "processes of a killed run are left"
    finally:
        kill(children)


def roles_of(process: subprocess.Popen, name: str) -> list[psutil.Process]:
    """Processes of actors by the title that Ray gives them, as in `ray::LearnerRank.train`."""
    found = []
    for child in psutil.Process(process.pid).children(recursive=True):
        with contextlib.suppress(psutil.NoSuchProcess):
            if name in " ".join(child.cmdline()):
                found.append(child)
    return found


@pytest.mark.full
@allow(2)
def test_an_engine_may_die_and_the_run_does_not_notice(whole, tmp_path):
    """The engine's process is killed twice; a new one joins at the current version, and the numbers stay the same."""
    folder, arguments = whole
    with started(*arguments, f"output={tmp_path}", "name=died") as process:
        for line in ("step 1/", "step 3/"):
            read_until(process, line)
            (engine,) = roles_of(process, "ray::EngineActor")
            engine.kill()
        code, out = finish(process)
    assert code == 0, out
    assert "rollout engine 0 died" in out
    assert_same_run(folder, tmp_path / "died")


@pytest.mark.full
@allow(2)
def test_a_learner_rank_may_die_and_the_run_goes_back_to_its_checkpoint(tmp_path):
    """One of two ranks is killed in a training pass: the other is ended, a new group goes on from the last checkpoint,
    the engine stays, and the numbers are those of an undisturbed run."""
    arguments = [*SMALL, "steps=4", "checkpoint.every=2", "evaluation.every=2", "learner.ranks=2", f"output={tmp_path}"]
    code, out = run(*arguments, "name=whole")
    assert code == 0, out
    with started(*arguments, "name=died") as process:
        read_until(process, "step 3/")
        (engine,) = roles_of(process, "ray::EngineActor")
        until = time.monotonic() + DEADLINE
        while len(training := roles_of(process, "ray::LearnerRank.train")) < 2 and time.monotonic() < until:
            time.sleep(0.01)
        assert len(training) == 2, "step 4 did not begin"
        training[1].kill()
        read_until(process, "resume from step 2")
        read_until(process, "step 3/")
        assert roles_of(process, "ray::EngineActor") == [engine]
        code, out = finish(process)
    assert code == 0, out
    assert_same_run(tmp_path / "whole", tmp_path / "died")
    assert [row["step"] for row in rows(tmp_path / "died", "metrics.discarded")] == [3]
    summaries = [json.loads((tmp_path / name / "summary.json").read_text()) for name in ("whole", "died")]
    assert [summary["weight_version"] for summary in summaries] == [[0, 4], [1, 4]]
    assert summaries[0]["ledger"] == summaries[1]["ledger"]


OBJECTIVE = """
from dataclasses import dataclass

from rltk.algorithms.grpo import GRPO
from rltk.algorithms.prompts import PromptSampler


@dataclass(frozen=True)
class Doubtful(PromptSampler):
    def weights(self, means):
        return [mean * (1 - mean) for mean in means]


class Varied(GRPO):
    def admit(self, group):
        return len({sample.reward.value for sample in group}) > 1

    def prompt_sampler(self):
        return Doubtful()
"""


@pytest.mark.full
@allow(3)
def test_refilled_batches_and_weighted_prompts_survive_a_kill(tmp_path):
    """A user's objective admits groups of mixed rewards alone and weights prompts: every batch is full of them, and a
    run that was killed with a checkpoint half written goes on as the same run."""
    (tmp_path / "my_objective.py").write_text(OBJECTIVE)
    arguments = [*SMALL, "algorithm=my_objective:Varied", "batch.refills=20", "steps=4", "checkpoint.every=1",
                 "evaluation.every=2", "task.levels=[1,2]", f"output={tmp_path}"]  # fmt: skip
    code, out = run(*arguments, "name=whole", path=tmp_path)
    assert code == 0, out
    assert sum(row["refill/rounds"] for row in rows(tmp_path / "whole")) > 0
    summary = json.loads((tmp_path / "whole" / "summary.json").read_text())
    assert summary["ledger"]["trained"] == 4 * 16 and summary["ledger"]["dropped"]["not admitted"] > 0
    dies_at("3:commit", *arguments, "name=cut", "resume=auto", path=tmp_path)
    code, out = run(*arguments, "name=cut", "resume=auto", path=tmp_path)
    assert code == 0, out
    assert_same_run(tmp_path / "whole", tmp_path / "cut")
    assert json.loads((tmp_path / "cut" / "summary.json").read_text())["ledger"] == summary["ledger"]


@pytest.mark.full
@allow(1)
def test_a_run_to_which_nothing_is_admitted_ends_with_the_reason(tmp_path):
    (tmp_path / "my_objective.py").write_text(OBJECTIVE.replace("> 1", "> 2"))
    keys = [*SMALL, "algorithm=my_objective:Varied", "batch.refills=1", "evaluation.every=0", f"output={tmp_path}"]
    code, out = run(*keys, "name=run", path=tmp_path)
    assert code == 1 and "3 steps in a row had nothing to learn from: Varied admitted none of 8 groups" in out, out
    assert [row["refill/not_admitted"] for row in rows(tmp_path / "run")] == [1.0, 1.0]
    assert not any("grad_norm" in row for row in rows(tmp_path / "run"))


@pytest.mark.full
@allow(1)
def test_an_interrupt_leaves_a_checkpoint_and_no_process(tmp_path):
    keys = [*SMALL, "steps=50", "checkpoint.every=0", "evaluation.every=0", f"output={tmp_path}", "name=run"]
    with started(*keys) as process:
        read_until(process, "step 1/")
        children = psutil.Process(process.pid).children(recursive=True)
        begun = time.monotonic()
        process.send_signal(signal.SIGINT)
        code, out = finish(process)
    assert code == 130, out
    try:
        assert not left_after(children, 60)
    finally:
        kill(children)
    steps = sorted(int(path.name[-6:]) for path in (tmp_path / "run" / "checkpoints").iterdir())
    assert steps[-1] >= 1 and steps[-1] == rows(tmp_path / "run")[-1]["step"], (steps, time.monotonic() - begun)
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["status"] == "interrupted"
