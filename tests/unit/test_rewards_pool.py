import asyncio
import os
import signal

import numpy as np
import pytest

from rltk.errors import InfrastructureError
from rltk.rewards.pool import RewardPool
from rltk.rewards.scorer import ScorerSpec
from rltk.trajectory import Record, Segment, Trajectory

USER_MODULE = """
import os, pathlib, signal, sys, threading, time

def score(trajectory, record):
    match trajectory.text:
        case "hang":
            while True:
                pass
        case "deaf":  # in C code, signals ignored
            for number in (signal.SIGTERM, signal.SIGINT, signal.SIGALRM):
                signal.signal(number, signal.SIG_IGN)
            return float(7 ** (10**9) > 0)
        case "exit":
            os._exit(3)
        case "crash":
            os.kill(os.getpid(), signal.SIGSEGV)
        case "memory":
            return float(len([0] * 10**10))
        case "raise":
            raise ValueError("bad text")
        case "main thread":
            return float(threading.current_thread() is threading.main_thread())
        case "modules":
            return float(not {"torch", "ray", "vllm"} & set(sys.modules))
        case "pid":
            return float(os.getpid())
        case "die once":
            path = pathlib.Path(record.answer)
            if not path.exists():
                path.touch()
                os.kill(os.getpid(), signal.SIGKILL)
    return 1.0

def slow(trajectory, record):
    time.sleep(0.1)
    return 1.0

class Huge:
    def __init__(self):
        self.data = bytearray(10**10)

    def score(self, record, text):
        return 1.0
"""


@pytest.fixture(autouse=True)
def user_module(tmp_path, monkeypatch):
    (tmp_path / "pool_rewards.py").write_text(USER_MODULE)
    monkeypatch.syspath_prepend(str(tmp_path))


def item(text, answer=""):
    trajectory = Trajectory("t", "p", "g", (Segment("prompt", np.arange(2)),), text)
    return trajectory, Record("p", ({"role": "user", "content": "?"},), answer)


def pool(target="score", **keywords):
    return RewardPool(ScorerSpec(f"pool_rewards:{target}", kind="function"), **keywords)


def test_every_way_to_fail_costs_one_sample_alone():
    texts = ["fine", "hang", "raise", "deaf", "exit", "crash", "memory", "main thread", "modules"]

    async def run():
        async with pool(sample_deadline_s=1.0) as rewards:
            return await rewards.score([item(text) for text in texts + ["fine"] * 20], deadline_s=90)

    records = asyncio.run(run())
    by_text = dict(zip(texts, records, strict=False))
    assert all(record.value == 1.0 for record in records[len(texts) :])
    assert [by_text[text].value for text in ("fine", "main thread", "modules")] == [1.0, 1.0, 1.0]
    assert all(by_text[text].value is None for text in texts[1:7])
    assert by_text["hang"].reason.startswith("timeout after 1 s in ") and "pool_rewards.py:" in by_text["hang"].reason
    assert by_text["deaf"].detail["cause"] == "timeout"
    assert by_text["exit"].reason == "worker died (exit code 3)"
    assert by_text["crash"].reason == "worker died (SIGSEGV)"
    assert by_text["memory"].reason.startswith("out of memory: the scorer needed more than 2 GiB")
    assert by_text["raise"].reason.startswith("ValueError: bad text (")


def test_a_process_killed_from_outside_costs_nothing(tmp_path):
    async def run():
        async with pool(processes=1) as rewards:
            first = await rewards.score(
                [item("die once", str(tmp_path / "marker"))] + [item("fine")] * 3, deadline_s=60
            )
            (pid,) = {record.value for record in await rewards.score([item("pid")] * 4, deadline_s=60)}
            os.kill(int(pid), signal.SIGKILL)  # idle now
            return first + await rewards.score([item("fine")] * 4, deadline_s=60)

    assert [record.value for record in asyncio.run(run())] == [1.0] * 8


def test_the_batch_deadline_bounds_a_batch_of_slow_samples():
    async def run():
        async with pool("slow", processes=1) as rewards:
            late = await rewards.score([item("")] * 200, deadline_s=1.0)
            return late, await rewards.score([item("")] * 2, deadline_s=60)

    late, after = asyncio.run(run())
    causes = [record.detail.get("cause", "scored") for record in late]
    assert causes[-1] == "not_scored" and "deadline of 1.0 s" in late[-1].reason
    assert [record.value for record in after] == [1.0, 1.0]


def test_what_cannot_start_says_why():
    async def run():
        huge = RewardPool(ScorerSpec("pool_rewards:Huge", kind="task"), processes=1, memory_gib=1.0)
        try:
            await huge.warm_up()
        finally:
            await huge.close()

    with pytest.raises(InfrastructureError, match="pool_rewards:Huge needs more than 1 GiB; raise reward.memory_gib"):
        asyncio.run(run())


def test_a_scorer_that_never_loads_masks_instead_of_hanging():
    async def run():
        rewards = pool("missing", processes=1)
        try:
            return await rewards.score([item("fine")], deadline_s=60)
        finally:
            await rewards.close()

    (record,) = asyncio.run(run())
    assert record.value is None and record.detail["cause"] == "no_process" and "missing" in record.reason


def test_closing_answers_those_who_wait():
    async def run():
        async with pool(processes=1) as rewards:
            waiting = asyncio.create_task(rewards.score([item("hang")] * 3))
            await asyncio.sleep(0.1)
        return await asyncio.wait_for(waiting, 30)

    assert [record.reason for record in asyncio.run(run())] == ["not scored: the reward pool was closed"] * 3


def test_stacks_say_where_a_process_is():
    async def run():
        async with pool(processes=1) as rewards:
            return await rewards.stacks()

    assert "in run" in asyncio.run(run())
