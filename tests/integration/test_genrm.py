"""The generative reward model on real engines: actors that judge, are cancelled, die and come back; over HTTP."""

import asyncio
import os
import signal
import time
from dataclasses import replace

import aiohttp
import psutil
import pytest
import ray

from rltk.rewards.genrm.backends import Chat, EngineBackend
from rltk.rewards.genrm.client import GenRMClient
from rltk.rewards.genrm.engine import JudgeEngine, replica_options
from rltk.rewards.genrm.engine import concurrency as replica_concurrency
from rltk.rewards.genrm.options import GenRMOptions
from rltk.rewards.genrm.process import process_of
from rltk.rewards.genrm.router import Router
from rltk.rewards.genrm.service import GenRMService, concurrency
from rltk.rewards.genrm.types import Prompt, Question
from rltk.rollout.engine import Request
from tests.integration.genrm_judge import Stand, Word
from tests.integration.places import ROOT, TINY

pytestmark = [pytest.mark.timeout(300), pytest.mark.full]  # engines start in ten to thirty seconds
OPTIONS = GenRMOptions(
    name="test", judge="tests.integration.genrm_judge:Echo", model=str(TINY), context=512, replicas=1, kv_cache_gib=0.1,
    max_sequences=16, threads=1, deadline_s=120.0, attempt_s=60.0, cache=0, breaker_pause_s=1.0,
)  # fmt: skip


@pytest.fixture(scope="module")
def cluster():
    os.environ.setdefault("RAY_AUTH_MODE", "disabled")
    env = {"PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}
    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False, runtime_env={"env_vars": env})
    yield
    ray.shutdown()


@pytest.fixture(scope="module")
def replica(cluster):
    return start_replica()


@pytest.fixture(scope="module")
def service(replica):
    return start_service([replica])


def start_replica():
    actor = ray.remote(JudgeEngine).options(
        num_cpus=0, max_restarts=-1, max_concurrency=replica_concurrency(OPTIONS)
    )  # fmt: skip
    handle = actor.remote(replica_options(OPTIONS, "cpu"))
    ray.get(handle.ready.remote(), timeout=120)
    return handle


def start_service(replicas):
    actor = ray.remote(GenRMService).options(
        num_cpus=0, max_restarts=-1, max_task_retries=2, max_concurrency=concurrency(OPTIONS)
    )  # fmt: skip
    handle = actor.remote(OPTIONS, replicas)
    assert ray.get(handle.ready.remote(), timeout=120) == "echo 1"
    return handle


def question(number):
    return Question(f"u{number}", "?", f"{number} + {number} = {2 * number}", None)


def settled(service):
    stats = ray.get(service.stats.remote(), timeout=30)
    assert stats["asked"] == stats["answered"] + stats["unanswered"] + stats["cancelled"] and not stats["in_flight"]
    return stats


async def wait_for(condition):
    while not await condition():
        await asyncio.sleep(0.2)


def test_verdicts_are_what_the_engine_writes_each_once_and_in_order(replica, service):
    async def direct(number):
        """The same prompt without the service."""
        chat = Chat(OPTIONS)
        ids = chat.encode(Prompt(({"role": "user", "content": question(number).response},), 24))
        completion = await replica.complete.remote(Request(f"d{number}", ids, 24, 0.0, 0, chat.stop_ids), 60.0)
        return chat.decode(completion.ids.tolist())

    async def scene():
        client = GenRMClient(service, OPTIONS, "test")
        batches = await asyncio.gather(*(client.judge([question(n) for n in range(b, 40, 4)]) for b in range(4)))
        return {b + 4 * i: v for b, verdicts in enumerate(batches) for i, v in enumerate(verdicts)}, [
            await direct(number) for number in range(3)
        ]

    verdicts, expected = asyncio.run(scene())
    assert sorted(verdicts) == list(range(40))
    assert all(verdict.value == 1.0 and verdict.detail["replica"] == "replica 0" for verdict in verdicts.values())
    assert [verdicts[number].detail["text"] for number in range(3)] == expected
    stats = settled(service)
    assert stats["answered"] == stats["router"]["answered"] == 40
    assert "replica 0" in ray.get(service.stacks.remote(), timeout=30)


def test_a_cancelled_question_leaves_the_engine_and_one_that_does_not_fit_is_masked(replica, service):
    async def scene():
        async def endless(deadline_s):
            return await replica.complete.remote(Request("endless", [5] * 8, 400, 1.0, 0, ()), deadline_s)

        async def tokens():
            return (await replica.stats.remote())["tokens"]

        before = await tokens()
        client = GenRMClient(service, OPTIONS, "test")
        (verdict,) = await client.judge([Question("long", "?", "1 " * 2000, None)])
        assert verdict.value is None and verdict.cause == "too_long"
        with pytest.raises(TimeoutError):
            await endless(0.05)
        chat = Chat(OPTIONS)
        chat.stop_ids = ()  # so that it writes 400 tokens unless it is stopped
        backend = EngineBackend("replica", replica, chat, OPTIONS)
        work = asyncio.ensure_future(backend.generate(Prompt(({"role": "user", "content": "1"},), 400), 60.0, "c"))
        await asyncio.sleep(0.2)
        work.cancel()
        work = asyncio.ensure_future(client.judge([question(n) for n in range(100, 116)]))
        await asyncio.sleep(0.02)
        work.cancel()
        with pytest.raises(asyncio.CancelledError):
            await work

        async def idle():
            before = (await replica.stats.remote())["busy_seconds"]
            await asyncio.sleep(0.3)
            stats = await service.stats.remote()
            return (await replica.stats.remote())["busy_seconds"] == before and stats["in_flight"] == 0

        await wait_for(idle)
        assert await tokens() - before <= 16 * 24  # both of 400 were stopped on the way
        (after,) = await client.judge([question(7)])
        assert after.value == 1.0

    asyncio.run(scene())
    assert settled(service)["cancelled"] > 0


async def survive(ask, answered, first, harm):
    """The answers to `first` questions, a replica harmed in the middle; returns when that one answers again."""
    work = asyncio.ensure_future(ask(first))
    await asyncio.sleep(0.4)
    harm()
    answers = await work
    before = await answered()

    async def back():
        await ask(4)
        return await answered() > before

    await wait_for(back)
    return answers


def test_a_replica_that_dies_in_the_middle_loses_no_question_and_comes_back(replica):
    replicas = [replica, start_replica()]
    service = start_service(replicas)
    client = GenRMClient(service, OPTIONS, "test")

    async def ask(count):
        return await client.judge([question(200 + n) for n in range(count)])

    async def answered():
        return (await service.stats.remote())["router"]["replicas"][1]["answered"]

    verdicts = asyncio.run(survive(ask, answered, 300, lambda: ray.kill(replicas[1], no_restart=False)))
    assert len(verdicts) == 300 and all(verdict.value == 1.0 for verdict in verdicts)
    stats = settled(service)
    assert stats["unanswered"] == 0 and stats["router"]["retries"] > 0


def test_a_service_whose_process_is_killed_comes_back_and_its_callers_are_answered(cluster, replica):
    service = start_service([replica])
    first = ray.get(process_of(service), timeout=60)

    async def scene():
        client = GenRMClient(service, OPTIONS, "test")
        await client.judge([question(1)])
        asked = [asyncio.ensure_future(client.judge([question(number)])) for number in range(20)]
        await asyncio.sleep(0)
        os.kill(first.pid, signal.SIGKILL)
        return [verdict for (verdict,) in await asyncio.gather(*asked)]

    verdicts = asyncio.run(scene())
    assert [verdict.value for verdict in verdicts] == [1.0] * 20  # Ray asks again, as judging has no effect outside
    assert ray.get(process_of(service), timeout=60).pid != first.pid
    assert settled(service)["answered"] <= 20
    ray.kill(service)


def test_the_questions_of_a_stopped_process_are_answered_elsewhere(cluster):
    """With an actor that starts at once, as a judge's engine takes its time on a busy machine."""
    options = replace(OPTIONS, attempt_s=2.0, breaker_pause_s=0.5)
    actor = ray.remote(Stand).options(num_cpus=0, max_concurrency=64)
    handles = [actor.remote() for _ in range(2)]
    pid = ray.get(handles[1].pid.remote(), timeout=60)

    async def scene():
        router = Router([EngineBackend(f"r{i}", handle, Word(), options) for i, handle in enumerate(handles)], options)

        async def one(number):
            session = router.session(f"q{number}", time.monotonic() + 100)
            return await session.ask(Prompt(({"role": "user", "content": str(number)},), 4))

        work = asyncio.gather(*(one(number) for number in range(2000)))
        await asyncio.sleep(0.3)
        os.kill(pid, signal.SIGSTOP)
        replies = await work
        await router.close()
        return len(replies), router.stats()

    try:
        count, stats = asyncio.run(scene())
    finally:
        os.kill(pid, signal.SIGKILL)
    assert count == 2000 and stats["asked"] == stats["answered"] and stats["retries"] > 0
    assert stats["replicas"][1]["state"] != "closed" and stats["replicas"][1]["failed"] >= 3


@pytest.mark.parametrize("met_by", ["its start", "a question"])  # the latter: the service was started anew
def test_a_process_that_has_stood_still_for_long_is_ended_and_started_anew(cluster, met_by):
    """By then Ray's own kill does not reach it: with ray.kill in place of the signal, this waits for ever."""
    handle = ray.remote(Stand).options(num_cpus=0, max_restarts=-1, max_concurrency=80).remote()
    pid = ray.get(handle.pid.remote(), timeout=60)
    backend = EngineBackend("r", handle, Word(), OPTIONS)

    async def scene():
        prompt = Prompt(({"role": "user", "content": "1"},), 4)
        if met_by == "its start":
            await backend.ready()
        while backend._process is None:
            await backend.generate(prompt, 60.0, "first")
        asked = [asyncio.ensure_future(backend.generate(prompt, 60.0, f"q{number}")) for number in range(60)]
        await asyncio.sleep(0.01)
        os.kill(pid, signal.SIGSTOP)
        _, late = await asyncio.wait(asked, timeout=30)
        for task in late:
            task.cancel()
        async with asyncio.timeout(120):
            return len(late), await backend.restart()

    try:
        late, back = asyncio.run(scene())
    finally:
        if psutil.pid_exists(pid):
            os.kill(pid, signal.SIGKILL)
    assert late and back and ray.get(handle.pid.remote(), timeout=30) != pid


def test_the_front_answers_over_http(service):
    from rltk.rewards.genrm import serve

    url = serve.start(service, OPTIONS, port=18732)

    async def scene():
        async with aiohttp.ClientSession() as session:

            async def post(body, path="/judge"):
                async with session.post(url + path, data=body) as response:
                    return response.status, await response.json()

            rows = ", ".join(f'{{"uid": "h{n}", "problem": "?", "response": "{n} + 1"}}' for n in range(20))
            status, found = await post(f'{{"questions": [{rows}], "deadline_s": 60}}')
            assert status == 200 and [verdict["value"] for verdict in found["verdicts"]] == [1.0] * 20
            for wrong, words in {
                "{": "Expecting",
                "[]": "must be a list",
                '{"questions": []}': "must be a list",
                '{"questions": [{"problem": "?"}]}': "question 0: response missing",
                '{"questions": [{"problem": "?", "response": "1", "label": 1}]}': "label unknown",
                '{"questions": [{"problem": "?", "response": "1"}], "deadline": 1}': "deadline unknown",
                '{"questions": [{"problem": "?", "response": "1"}], "deadline_s": 1e9}': "up to 120",
            }.items():
                status, found = await post(wrong)
                assert status == 400 and words in found["error"]
            assert (await post("{}", "/other"))[0] == 404
            async with session.get(url + "/health") as response:
                assert response.status == 200 and (await response.json())["status"] == "ok"
            ray.kill(service, no_restart=True)
            time.sleep(1)
            async with session.get(url + "/health") as response:
                assert response.status == 503
            status, found = await post('{"questions": [{"problem": "?", "response": "1"}]}')
            assert status == 200 and found["verdicts"][0]["cause"] == "unavailable"

    try:
        asyncio.run(scene())
    finally:
        serve.stop()
