"""Reward processes under real conditions: inside a Ray actor, with async scorers, with children of their own."""

import asyncio
import os
import signal
import sys
import time

import numpy as np
import pytest
import ray

from rltk.rewards.actor import RewardWorker
from rltk.rewards.pool import RewardPool
from rltk.rewards.scorer import ScorerSpec
from rltk.tasks.reasoning_gym import ReasoningGym
from rltk.trajectory import Record, Segment, Trajectory

pytestmark = pytest.mark.timeout(120)

USER_MODULE = """
import asyncio, os, pathlib, subprocess, sys


def score(trajectory, record):
    match trajectory.text:
        case "hang":
            while True:
                pass
        case "raise":
            raise ValueError("bad text")
        case "pid":
            return float(os.getpid())
        case "parent":
            return float(os.getppid())
        case "child":
            child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
            pathlib.Path(record.answer).write_text(str(child.pid))
            while True:
                pass
    return 1.0


async def score_async(trajectory, record):
    if trajectory.text == "block":
        while True:
            pass
    await asyncio.sleep(600 if trajectory.text == "hang" else 0.1)
    return 1.0
"""


@pytest.fixture(scope="module")
def user_module(tmp_path_factory):
    folder = tmp_path_factory.mktemp("user")
    (folder / "ray_rewards.py").write_text(USER_MODULE)
    sys.path.insert(0, str(folder))
    yield folder
    sys.path.remove(str(folder))


@pytest.fixture(scope="module")
def cluster(user_module):
    os.environ.setdefault("RAY_AUTH_MODE", "disabled")
    path = os.pathsep.join([str(user_module), os.getcwd()])
    ray.init(num_cpus=1, include_dashboard=False, log_to_driver=False, runtime_env={"env_vars": {"PYTHONPATH": path}})
    yield
    ray.shutdown()


def item(text, answer=""):
    trajectory = Trajectory("t", "p", "g", (Segment("prompt", np.arange(2)),), text)
    return trajectory, Record("p", ({"role": "user", "content": "?"},), answer)


SPEC = ScorerSpec("ray_rewards:score", kind="function")


def pool(target="score", **keywords):
    return RewardPool(ScorerSpec(f"ray_rewards:{target}", kind="function"), **keywords)


def test_in_an_actor_a_hanging_sample_stops_nobody_and_an_exception_masks(cluster):
    worker = RewardWorker.remote(SPEC, processes=2, sample_deadline_s=2.0)
    ray.get(worker.ready.remote(), timeout=60)
    hanging = worker.score.remote([item("hang"), item("raise")], 60)
    others = ray.get(worker.score.remote([item("fine")] * 40, 60), timeout=60)
    assert [record.value for record in others] == [1.0] * 40
    assert "reward process" in ray.get(worker.stacks.remote(), timeout=10)  # it answers while one of them hangs
    hang, failed = ray.get(hanging, timeout=60)
    assert hang.value is None and hang.reason.startswith("timeout after 2 s in ")
    assert failed.value is None and failed.reason.startswith("ValueError: bad text (")
    stats = ray.get(worker.stats.remote(), timeout=10)
    assert (stats["scored"], stats["timeout"], stats["exception"]) == (40, 1, 1)
    ray.get(worker.close.remote(), timeout=20)


def test_an_actor_that_is_killed_comes_back_and_its_processes_do_not_outlive_it(cluster):
    worker = RewardWorker.remote(SPEC, processes=1, sample_deadline_s=3.0)
    process, parent = (
        int(r.value) for r in ray.get(worker.score.remote([item("pid"), item("parent")], 60), timeout=60)
    )
    under_way = worker.score.remote([item("hang"), item("fine")], 60)
    time.sleep(0.5)
    os.kill(parent, signal.SIGKILL)  # the actor, in the middle of the hanging sample
    hang, fine = ray.get(under_way, timeout=90)
    assert hang.value is None and fine.value == 1.0
    assert ends(process)


def test_an_async_scorer_runs_its_samples_at_once(user_module):
    async def run():
        async with pool("score_async", processes=1, sample_deadline_s=1.5) as rewards:
            records = await rewards.score([item(t) for t in ["fine"] * 20 + ["hang"]], deadline_s=90)
            records += await rewards.score([item(t) for t in ["fine", "block", "fine"]], deadline_s=90)
            return records, rewards.stats()

    records, stats = asyncio.run(run())
    assert all(record.value == 1.0 for record in records[:20])
    assert [record.value for record in records[20:]] == [None, 1.0, None, 1.0]
    assert (stats["scored"], stats["timeout"]) == (22, 2)


def test_killing_takes_the_children_along_and_close_leaves_nothing(user_module, tmp_path):
    note = tmp_path / "child"

    async def run():
        async with pool(processes=1, sample_deadline_s=1.5) as rewards:
            (pid,) = [record.value for record in await rewards.score([item("pid")], deadline_s=60)]
            await rewards.score([item("child", str(note))], deadline_s=60)
            return int(pid)

    pid = asyncio.run(run())
    assert ends(int(note.read_text())) and ends(pid)


def test_processes_are_recycled(user_module):
    async def run():
        async with pool(processes=1, samples_per_process=1) as rewards:
            return [(await rewards.score([item("pid")], deadline_s=60))[0].value for _ in range(2)]

    assert len(set(asyncio.run(run()))) == 2


def test_answers_are_evaluated_in_a_jail_inside_the_reward_process(tmp_path):
    """Four of reasoning-gym's scorers call eval; the process that scores is limited and on its own already."""
    made = tmp_path / "made"
    options = {"max_prompt_tokens": 512, "max_response_tokens": 512, "dataset": "spiral_matrix"}
    options["isolation"] = "best_effort"
    record = ReasoningGym(**options).problem(0)
    value = [int(word) for word in record.answer.split()]
    answers = [record.answer, f"{value} + []", f"__import__('os').system('touch {made}') or {value}", "[1] * 10**9"]

    async def run():
        spec = ScorerSpec("rltk.tasks.reasoning_gym:ReasoningGym", options, "task", on_timeout="wrong")
        async with RewardPool(spec, processes=1) as rewards:
            texts = [f"<answer>{answer}</answer>" for answer in answers]
            return await rewards.score([(item(text)[0], record) for text in texts], deadline_s=60), rewards.stats()

    records, stats = asyncio.run(run())
    assert [record.value for record in records] == [1.0, 0.1, 0.0, 0.0]
    assert stats["started"] == 1 and not made.exists(), "the process has lived through them"


def ends(pid):
    """Waits up to 10 s. A zombie counts as ended: one whose parent does not reap stays in the table."""
    end = time.monotonic() + 10
    while time.monotonic() < end:
        try:
            with open(f"/proc/{pid}/stat") as stat:
                if stat.read().rpartition(")")[2].split()[0] == "Z":
                    return True
        except FileNotFoundError:
            return True
        time.sleep(0.02)
    return False
