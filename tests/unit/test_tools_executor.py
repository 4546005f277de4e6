"""Executors and their clients in one process: queues, deadlines, retries. With Ray: tests/integration."""

import asyncio
import sys
import threading
import time
import types

import pytest

from rltk.errors import ConfigError, InfrastructureError
from rltk.rollout.tools import client as client_module
from rltk.rollout.tools.client import ToolClient
from rltk.rollout.tools.executor import ToolExecutor, concurrency
from rltk.rollout.tools.options import ToolOptions
from rltk.rollout.tools.types import ToolRequest, ToolResult

GATE = threading.Event()
SEEN: list[str] = []


async def nap(seconds: float) -> str:
    await asyncio.sleep(seconds)
    return "woke"


async def cancelled_nap() -> str:
    try:
        await asyncio.sleep(60)
    except asyncio.CancelledError:
        SEEN.append("cancelled")
        raise
    return "woke"


def quick() -> str:
    return "quick"


def gated() -> str:
    GATE.wait(20)
    return "through"


def down() -> str:
    raise InfrastructureError("the index is not loaded")


class Count:
    """Counts actions; says at which it stands."""

    def __init__(self):
        self.actions = []

    def reset(self, record_data):
        SEEN.append("reset")
        self.limit = record_data["limit"]
        return record_data.get("first")

    async def step(self, action):
        if action == "fail":
            raise ValueError("broken environment")
        if action == "odd":
            return "no pair"
        self.actions.append(action)
        return f"{len(self.actions)}: {' '.join(self.actions)}", len(self.actions) >= self.limit


@pytest.fixture(autouse=True)
def module(monkeypatch):
    """The functions above as a user's module, by a name that does not depend on how tests are imported."""
    made = types.ModuleType("executor_tools")
    made.__dict__.update({f.__name__: f for f in (nap, cancelled_nap, quick, gated, down, Count)})
    monkeypatch.setitem(sys.modules, "executor_tools", made)
    GATE.clear()
    SEEN.clear()
    yield
    GATE.set()  # no thread is left waiting


def options(*names, **others):
    return ToolOptions(use=[f"executor_tools:{name}" for name in names], **others)


def request(name, turn=0, deadline_s=20.0, trajectory="t", history=(), context=None, wait_s=20.0, **arguments):
    return ToolRequest(trajectory, turn, name, arguments, tuple(history), context or {}, deadline_s, wait_s)


# -- the executor ------------------------------------------------------------------------------------------------------


def test_waiting_is_counted_apart_from_running_and_a_full_queue_is_answered_at_once():
    async def scene():
        executor = ToolExecutor(options("nap", slots=1, queue=2))
        calls = [asyncio.create_task(executor.call(request("nap", seconds=0.2))) for _ in range(4)]
        start = time.monotonic()
        results = await asyncio.gather(*calls)
        return results, await executor.stats(), time.monotonic() - start

    results, stats, elapsed_s = asyncio.run(scene())
    assert [result.status for result in results] == ["ok", "ok", "ok", "infra_error"]
    assert results[3].text == "queue full: 2 calls wait here (tools.queue)"
    assert results[1].queue_s > 0.19 and results[2].queue_s > 0.38 and all(r.run_s > 0.19 for r in results[:3])
    assert all(result.queue_s + result.run_s <= elapsed_s for result in results), "counted twice"
    assert (stats["ok"], stats["infra_error"], stats["waiting"], stats["running"]) == (3, 1, 0, 0)
    assert stats["run_s"] > 0.5 and concurrency(options("nap", slots=1, queue=2)) > 3


def test_a_tool_whose_places_are_all_taken_does_not_hold_up_another():
    async def scene():
        executor = ToolExecutor(options("gated", "quick", slots=1))
        slow = asyncio.create_task(executor.call(request("gated")))
        while (await executor.stats())["running"] == 0:
            await asyncio.sleep(0.01)
        first = await executor.call(request("quick"))
        assert not slow.done()
        GATE.set()
        return first, await slow

    first, slow = asyncio.run(scene())
    assert (first.text, slow.text) == ("quick", "through")


def test_a_call_past_its_deadline_is_the_functions_fault_and_a_long_wait_is_nobodys(monkeypatch):
    monkeypatch.setattr("rltk.rollout.tools.executor.GRACE_S", 0.05)

    async def scene():
        executor = ToolExecutor(options("nap", "cancelled_nap", slots=1))
        late = await executor.call(request("cancelled_nap", deadline_s=0.1))
        holder = asyncio.create_task(executor.call(request("nap", seconds=0.4)))
        await asyncio.sleep(0.01)
        waited = executor.call(request("nap", wait_s=0.1, seconds=0.0))
        patient = executor.call(request("nap", deadline_s=0.2, seconds=0.0))  # waits longer than it may then run
        return late, *await asyncio.gather(waited, patient, holder)

    late, waited, patient, holder = asyncio.run(scene())
    assert (late.status, late.limit) == ("timeout", "call 0.1 s") and "cancelled" in SEEN
    assert waited.status == "infra_error" and "no place free within 0.1 s" in waited.text and waited.queue_s > 0.09
    assert (patient.status, holder.status) == ("ok", "ok") and patient.queue_s > 0.3


def test_what_cannot_be_answered_is_no_answer():
    async def scene():
        executor = ToolExecutor(options("down", "quick"))
        return [await executor.call(request(name)) for name in ("down", "missing")]

    failed, unknown = asyncio.run(scene())
    assert (failed.status, failed.text) == ("infra_error", "the index is not loaded")
    assert (unknown.status, unknown.text) == ("unknown_tool", "there is no tool 'missing'; there are down, quick")


def test_ready_says_what_stands_and_what_is_in_the_way():
    executor = ToolExecutor(options("quick"))
    assert asyncio.run(executor.ready()) == {"isolation": "", "tools": ["quick"]}
    with pytest.raises(ConfigError, match="has no attribute 'quik'"):
        asyncio.run(ToolExecutor(options("quik")).ready())
    assert "tool executor" in asyncio.run(executor.stacks())


def test_a_caller_that_goes_takes_its_call_along():
    async def scene():
        executor = ToolExecutor(options("cancelled_nap", slots=1))
        call = asyncio.create_task(executor.call(request("cancelled_nap")))
        while (await executor.stats())["running"] == 0:
            await asyncio.sleep(0.01)
        call.cancel()
        await asyncio.gather(call, return_exceptions=True)
        await asyncio.sleep(0)
        return await executor.stats()

    assert asyncio.run(scene())["running"] == 0 and SEEN == ["cancelled"]


# -- environments ------------------------------------------------------------------------------------------------------


def play(executor, *actions, history=(), **more):
    """Steps one after the other, each with the history that a turn loop would send."""

    async def steps():
        results, done = [], [{"action": action} for action in history]
        for action in actions:
            result = await executor.call(request("Count", history=done, context={"limit": 4}, action=action, **more))
            results.append(result)
            done.append({"action": action})
        return results

    return steps()


def test_an_environment_keeps_its_state_until_it_is_done():
    async def scene():
        executor = ToolExecutor(options("Count"))
        first = await executor.call(request("Count", context={"limit": 2, "first": "Go."}))
        silent = await executor.call(request("Count", trajectory="u", context={"limit": 2}))
        return first, silent, await play(executor, "a", "b")

    first, silent, (one, two) = asyncio.run(scene())
    assert (first.text, silent.text) == ("Go.", "")
    assert (one.text, one.done) == ("1: a", False)
    assert (two.text, two.done) == ("2: a b", True)
    assert SEEN == ["reset", "reset"]


def test_a_lost_or_diverged_state_is_rebuilt_from_the_actions():
    async def scene():
        executor = ToolExecutor(options("Count"))
        (lost,) = await play(executor, "c", history="ab")  # as after a restart: nothing is held
        await play(executor, "x", history="abc")  # a try that its caller never heard of
        (again,) = await play(executor, "d", history="abc")
        return lost, again

    lost, again = asyncio.run(scene())
    assert (lost.text, again.text, again.done) == ("3: a b c", "4: a b c d", True)
    assert SEEN == ["reset", "reset"]


def test_an_environments_own_failure_is_never_shown():
    async def scene():
        executor = ToolExecutor(options("Count"))
        failed, went_on = await play(executor, "fail", "a")
        (odd,) = await play(executor, "odd")
        ended = (await play(executor, "e", history="abcd"))[0]
        return failed, went_on, odd, ended

    failed, went_on, odd, ended = asyncio.run(scene())
    assert failed.status == "infra_error" and "broken environment" in failed.text
    assert went_on.status == "infra_error", "the failed action is part of the history: it cannot be repeated"
    assert odd.status == "infra_error" and "not (observation: str, done: bool)" in odd.text
    assert ended.status == "infra_error" and "ended at action 4" in ended.text


# -- the client --------------------------------------------------------------------------------------------------------


class Handle:
    """As an actor's: `.call.remote(request)`. Answers come from a function, which may raise."""

    def __init__(self, answer):
        self.calls = []
        self.call, self.stacks, self.stats = (types.SimpleNamespace() for _ in range(3))
        self.call.remote = lambda asked: self._answer(answer, asked)
        self.stacks.remote = self._stacks

    async def _answer(self, answer, asked):
        self.calls.append(asked)
        value = answer(asked)
        return await value if asyncio.iscoroutine(value) else value

    async def _stacks(self):
        return "stacks"


def works(text="ok"):
    return lambda asked: ToolResult("ok", text)


def dies(asked):
    raise RuntimeError("the actor died")


@pytest.fixture
def no_pause(monkeypatch):
    monkeypatch.setattr(client_module, "PAUSE_S", 0.0)


def test_a_failed_call_goes_to_another_executor_and_the_failed_one_is_shunned(no_pause):
    async def scene():
        dead, alive = Handle(dies), Handle(works())
        client = ToolClient([dead, alive], options("quick"))
        results = [await client.call(request("quick", turn)) for turn in range(6)]
        return results, len(dead.calls), len(alive.calls)

    results, dead, alive = asyncio.run(scene())
    assert {result.status for result in results} == {"ok"} and (dead, alive) == (1, 6)


def test_one_executor_is_tried_again_and_the_last_word_names_every_try(no_pause):
    answers = iter([ToolResult("infra_error", "queue full"), ToolResult("ok", "second")])

    async def scene():
        recovered = await ToolClient([Handle(lambda _: next(answers))], options("quick")).call(request("quick"))
        dead = Handle(dies)
        return recovered, await ToolClient([dead], options("quick")).call(request("quick")), len(dead.calls)

    recovered, lost, tries = asyncio.run(scene())
    assert recovered.text == "second" and tries == 3
    assert lost.status == "infra_error" and lost.text.startswith("3 tries failed: executor 0: RuntimeError: the actor")


@pytest.mark.parametrize("status", ["error", "timeout", "oom", "killed", "output_limit"])
def test_what_the_code_did_is_not_tried_again(status, no_pause):
    handle = Handle(lambda _: ToolResult(status))
    assert asyncio.run(ToolClient([handle], options("quick")).call(request("quick"))).status == status
    assert len(handle.calls) == 1


def test_an_executor_that_lives_is_waited_for_and_one_that_no_longer_answers_is_left(no_pause, monkeypatch):
    monkeypatch.setattr(client_module, "MARGIN_S", 0.05)
    monkeypatch.setattr(client_module, "ANSWER_S", 0.1)

    async def scene(stats, **more):
        slow, other = Handle(lambda _: asyncio.sleep(0.4, ToolResult("ok", "slow"))), Handle(works("other"))
        slow.stats.remote = stats
        return (await ToolClient([slow, other], options("quick")).call(request("quick", deadline_s=0.05, **more))).text

    async def lives():
        return {}

    assert asyncio.run(scene(lives)) == "slow"
    assert asyncio.run(scene(lambda: asyncio.sleep(60))) == "other"
    assert asyncio.run(scene(lives, wait_s=0.0)) == "other"  # longer than it may wait and run


def test_however_many_calls_wait_an_executor_is_asked_once_at_a_time(monkeypatch):
    monkeypatch.setattr(client_module, "MARGIN_S", 0.01)
    under_way, most = 0, 0

    async def stats():
        nonlocal under_way, most
        under_way, most = under_way + 1, max(most, under_way + 1)
        await asyncio.sleep(0.02)
        under_way -= 1

    async def scene():
        handle = Handle(lambda _: asyncio.sleep(0.3, ToolResult("ok")))
        handle.stats.remote = stats
        client = ToolClient([handle], options("quick"))
        return await asyncio.gather(*(client.call(request("quick", turn, deadline_s=0.01)) for turn in range(50)))

    assert {result.status for result in asyncio.run(scene())} == {"ok"} and most == 1


def test_tries_share_the_time_that_a_call_may_wait(no_pause):
    handle = Handle(lambda _: asyncio.sleep(0.1, ToolResult("infra_error")))
    asyncio.run(ToolClient([handle], options("quick")).call(request("quick", wait_s=0.15)))
    first, second, third = (asked.wait_s for asked in handle.calls)
    assert first <= 0.15 and second <= 0.06 and third == 0.0


def test_calls_go_to_the_least_loaded():
    async def scene():
        handles = [Handle(lambda _: asyncio.sleep(0.05, ToolResult("ok"))) for _ in range(3)]
        client = ToolClient(handles, options("quick"))
        await asyncio.gather(*(client.call(request("quick", turn)) for turn in range(9)))
        return [len(handle.calls) for handle in handles]

    assert asyncio.run(scene()) == [3, 3, 3]


def test_an_environments_trajectory_stays_with_its_executor_while_that_stands(no_pause):
    async def scene():
        handles = [Handle(works()) for _ in range(3)]
        client = ToolClient(handles, options("Count"))
        for turn in range(4):
            await client.call(request("Count", turn, trajectory="one"))
        spread = [ToolClient(handles, options("Count"))._choose(f"t{number}", []) for number in range(60)]
        return sorted(len(handle.calls) for handle in handles), {spread.count(number) > 9 for number in range(3)}

    calls, spread = asyncio.run(scene())
    assert calls == [0, 0, 4] and spread == {True}
