"""Tool executors as Ray actors: killed in the middle of calls, many calls at once, states that come back."""

import asyncio
import os
import signal
import sys
import time
from pathlib import Path

import psutil
import pytest
import ray

from rltk.errors import ConfigError
from rltk.rollout.tools.client import ToolClient
from rltk.rollout.tools.executor import ToolExecutor, concurrency
from rltk.rollout.tools.options import JailOptions, ToolOptions
from rltk.rollout.tools.types import ToolRequest

pytestmark = pytest.mark.timeout(180)

USER_MODULE = '''
import asyncio, os, pathlib


def process() -> int:
    return os.getpid()


async def once(note: str) -> str:
    """Hangs for whoever calls first; answers the next."""
    path = pathlib.Path(note)
    if path.exists():
        return "second"
    path.write_text(str(os.getpid()))
    await asyncio.sleep(600)
    return "first"


class Sum:
    def reset(self, record_data):
        self.total = record_data["start"]

    def step(self, action):
        if action == "process":
            return str(os.getpid()), False
        self.total += int(action)
        return str(self.total), self.total > 100
'''
LOCAL = JailOptions(isolation="best_effort", cpu_s=10.0)


@pytest.fixture(scope="module")
def cluster(tmp_path_factory):
    folder = tmp_path_factory.mktemp("user")
    (folder / "ray_tools.py").write_text(USER_MODULE)
    sys.path.insert(0, str(folder))
    os.environ.setdefault("RAY_AUTH_MODE", "disabled")
    path = os.pathsep.join([str(folder), os.getcwd()])
    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False, runtime_env={"env_vars": {"PYTHONPATH": path}})
    yield
    ray.shutdown()
    sys.path.remove(str(folder))


def start(options, count=1):
    """Executors as a run starts them, standing."""
    actor = ray.remote(ToolExecutor).options(num_cpus=0, max_restarts=-1, max_concurrency=concurrency(options))
    executors = [actor.remote(options) for _ in range(count)]
    ray.get([executor.ready.remote() for executor in executors], timeout=60)
    return executors


def request(name, turn=0, trajectory="t", history=(), **arguments):
    return ToolRequest(trajectory, turn, name, arguments, tuple(history), {"start": 1}, 60.0)


def test_two_hundred_programs_at_once_each_get_their_own_result(cluster):
    options = ToolOptions(use=["python"], jail=LOCAL, slots=2)

    async def scene():
        (executor,) = start(options)
        client = ToolClient([executor], options)
        calls = [client.call(request("python", trajectory=f"t{n}", code=f"print({n} ** 7)")) for n in range(200)]
        return await asyncio.gather(*calls), await executor.stats.remote(), await executor.stacks.remote()

    results, stats, stacks = asyncio.run(scene())
    assert [result.text for result in results] == [f"{n**7}\n" for n in range(200)]
    waits = sorted(result.queue_s for result in results)
    assert waits[0] < waits[100] < waits[199] and all(result.run_s < waits[199] for result in results)
    assert (stats["ok"], stats["waiting"], stats["running"]) == (200, 0, 0) and "tool executor" in stacks


def test_an_executor_killed_in_the_middle_of_a_call_costs_time_and_not_the_call(cluster, tmp_path):
    options, note = ToolOptions(use=["ray_tools:once"]), tmp_path / "note"

    async def scene():
        client = ToolClient(start(options), options)
        call = asyncio.create_task(client.call(request("once", note=str(note))))
        os.kill(int(await written(note)), signal.SIGKILL)
        return await call

    result = asyncio.run(scene())
    assert (result.status, result.text) == ("ok", "second")


def test_a_program_does_not_outlive_its_executor(cluster):
    options = ToolOptions(use=["python", "ray_tools:process"], jail=LOCAL)

    async def scene():
        (executor,) = start(options)
        pid = int((await executor.call.remote(request("process"))).text)
        hanging = executor.call.remote(request("python", code="import time\ntime.sleep(600)"))
        while not (programs := psutil.Process(pid).children()):
            await asyncio.sleep(0.02)
        os.kill(pid, signal.SIGKILL)
        with pytest.raises(ray.exceptions.RayActorError):
            await hanging
        return programs

    (program,) = asyncio.run(scene())
    _, alive = psutil.wait_procs([program], timeout=20)
    assert not [process for process in alive if process.status() != psutil.STATUS_ZOMBIE]


def test_an_environments_state_survives_its_executor(cluster):
    options = ToolOptions(use=["ray_tools:Sum"])

    async def scene():
        client, history, said = ToolClient(start(options, 2), options), [], []
        await client.call(request("Sum"))
        for turn, action in enumerate(["2", "process", "3", "95"]):
            result = await client.call(request("Sum", turn, history=history, action=action))
            history.append({"action": action})
            said.append(result)
            if action == "process":
                os.kill(int(result.text), signal.SIGKILL)
        return said

    said = asyncio.run(scene())
    assert [(said[n].text, said[n].done) for n in (0, 2, 3)] == [("3", False), ("6", False), ("101", True)]


def test_what_keeps_an_executor_from_standing_is_said_at_the_start(cluster):
    actor = ray.remote(ToolExecutor).options(num_cpus=0).remote(ToolOptions(use=["ray_tools:sum"]))
    with pytest.raises(ConfigError, match="ray_tools has no attribute 'sum'.*did you mean Sum"):
        ray.get(actor.ready.remote(), timeout=60)


async def written(path: Path) -> str:
    end = time.monotonic() + 60
    while time.monotonic() < end:
        if path.exists() and path.read_text():
            return path.read_text()
        await asyncio.sleep(0.02)
    raise AssertionError(f"{path.name} was not written")
