"""The router with replicas that die, hang, write garbage: where a prompt goes, and that each ends exactly once."""

import asyncio
import time
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rltk.rewards.genrm import router as router_module
from rltk.rewards.genrm.breaker import Breaker
from rltk.rewards.genrm.router import Router
from rltk.rewards.genrm.types import JudgeUnavailable, Prompt
from tests.unit.genrm_fakes import FLAWED, QUICK, REFUSED, SOUND, Fake, until

pytestmark = pytest.mark.timeout(60)
PROMPT = Prompt(({"role": "user", "content": "Is it right?"},), 16)


@pytest.fixture(autouse=True)
def short_pauses(monkeypatch):
    monkeypatch.setattr(router_module, "PAUSE_S", 0.001)


def prompt(text):
    return Prompt(({"role": "user", "content": text},), 16)


def ask(router, uid="q", left=20.0, only=None, what=PROMPT):
    return asyncio.ensure_future(router.session(uid, time.monotonic() + left, only).ask(what))


def idle(router):
    stats = router.stats()
    ended = stats["answered"] + stats["cancelled"] + sum(stats["failed"].values())
    assert stats["asked"] == ended and stats["in_flight"] == stats["waiting"] == 0
    assert all(one["load"] == 0 for one in stats["replicas"])
    return stats


# -- the breaker -------------------------------------------------------------------------------------------------------


def test_a_breaker_opens_after_failures_in_a_row_and_lets_one_trial_in_after_its_pause():
    now = [0.0]
    breaker = Breaker(3, 10.0, lambda: now[0])
    assert [breaker.failure(breaker.begin()) for _ in range(2)] == [False, False]
    breaker.success(breaker.begin())
    assert [breaker.failure(False) for _ in range(3)] == [False, False, True]
    assert breaker.state == "open" and not breaker.allows()
    assert not breaker.failure(False)  # of a question that was under way: it neither counts nor prolongs
    now[0] = 10.0
    assert breaker.state == "half_open" and breaker.begin() and not breaker.allows()
    assert not breaker.failure(False) and not breaker.allows()  # late again; the trial is still out
    assert breaker.failure(True) and breaker.state == "open"
    now[0] = 29.9
    assert breaker.state == "open"  # twice the pause
    now[0] = 30.0
    trial = breaker.begin()
    breaker.abandon(trial)
    assert breaker.allows()
    breaker.success(breaker.begin())
    assert breaker.state == "closed" and breaker.openings == 0


def test_a_breakers_pause_is_bounded_and_an_old_answer_closes_it():
    now = [0.0]
    breaker = Breaker(1, 10.0, lambda: now[0])
    assert breaker.failure(False)
    for _ in range(8):
        now[0] += breaker.pause_s
        assert breaker.failure(breaker.begin())
    assert breaker.pause_s == 60.0
    breaker.success(False)
    assert breaker.state == "closed"
    assert breaker.failure(False) and breaker.pause_s == 10.0


# -- where a prompt goes -----------------------------------------------------------------------------------------------


def test_prompts_spread_over_replicas_and_wait_when_all_places_are_taken():
    async def scene():
        gate = asyncio.Event()
        a, b = Fake("a", gate=gate), Fake("b", gate=gate)
        router = Router([a, b], QUICK)
        asked = [ask(router, f"q{n}") for n in range(13)]
        await until(lambda: a.running + b.running == 8)
        assert (a.running, b.running, router.stats()["waiting"]) == (4, 4, 5)
        gate.set()
        replies = await asyncio.gather(*asked)
        assert all(reply.text == SOUND for reply in replies) and a.most == b.most == 4
        assert len(set(a.uids + b.uids)) == 13  # a replica never sees a uid twice
        return idle(router)

    assert asyncio.run(scene())["answered"] == 13


def test_a_failed_generation_goes_to_another_replica_and_says_so_if_all_fail():
    async def scene():
        a, b, c = Fake("a", default="gone"), Fake("b"), Fake("c", default="gone")
        assert (await ask(Router([a, b], QUICK))).replica == "b" and len(a.uids) == 1
        router = Router([a, c], QUICK)
        with pytest.raises(JudgeUnavailable, match=r"question q: .*killed.*killed.*killed") as error:
            await ask(router)
        assert error.value.cause == "unavailable"
        stats = idle(router)
        assert stats["failed"] == {"unavailable": 1} and stats["retries"] == 2
        assert {one["name"]: one["failed"] for one in stats["replicas"]} in ({"a": 2, "c": 1}, {"a": 1, "c": 2})

    asyncio.run(scene())


def test_the_same_chat_asked_again_goes_to_another_replica():
    async def scene():
        a, b = Fake("a"), Fake("b")
        session = Router([a, b], QUICK).session("q", time.monotonic() + 20)
        first = await session.ask(PROMPT)
        second = await session.ask(replace(PROMPT, seed=1, temperature=0.6))
        third = await session.ask(PROMPT)
        return first.replica, second.replica, third.replica

    first, second, third = asyncio.run(scene())
    assert {first, second} == {"a", "b"} and third in ("a", "b")


def test_a_hanging_replica_is_left_after_its_time_and_its_work_is_cancelled():
    async def scene():
        a, b = Fake("a", default="hang"), Fake("b")
        router = Router([a, b], replace(QUICK, attempt_s=0.05))
        replies = await asyncio.gather(*(ask(router, f"q{n}") for n in range(6)))
        assert {reply.replica for reply in replies} == {"b"}
        await until(lambda: a.running == 0)
        assert a.cancelled == len(a.uids) == idle(router)["retries"] > 0

    asyncio.run(scene())


@pytest.mark.parametrize("fault", [REFUSED, JudgeUnavailable("refused", "HTTP status 401")])
def test_what_is_the_prompts_own_fault_is_neither_retried_nor_held_against_the_replica(fault):
    async def scene():
        a = Fake("a", default=fault)
        router = Router([a, Fake("b", default=fault)], QUICK)
        for _ in range(5):
            with pytest.raises(JudgeUnavailable, match=str(fault)) as error:
                await ask(router)
            assert error.value.cause == fault.cause
        stats = idle(router)
        assert stats["retries"] == 0 and {one["state"] for one in stats["replicas"]} == {"closed"}

    asyncio.run(scene())


@pytest.mark.parametrize("garbage", [None, {"text": "\\boxed{-1}"}, SOUND.encode()])
def test_what_is_no_reply_is_garbage_and_asked_elsewhere(garbage):
    async def scene():
        a = Fake("a")
        a.default = garbage
        router = Router([a], QUICK)
        with pytest.raises(JudgeUnavailable, match=f"{type(garbage).__name__} in place of a reply") as error:
            await ask(router)
        assert error.value.cause == "garbage"
        assert (await ask(Router([a, Fake("b")], QUICK))).replica == "b"

    asyncio.run(scene())


# -- breakers in the router --------------------------------------------------------------------------------------------


def test_a_replica_that_fails_gets_no_more_prompts_until_a_trial_succeeds():
    async def scene():
        a, b = Fake("a", script=["gone"] * 3), Fake("b")
        router = Router([a, b], QUICK)
        while a.script:
            assert (await ask(router)).replica == "b"
        assert router.stats()["replicas"][0]["state"] in ("open", "half_open")
        await until(lambda: router.stats()["replicas"][0]["state"] == "half_open")
        b.gate = asyncio.Event()
        assert (await ask(router, only="a")).replica == "a"
        assert router.stats()["replicas"][0]["state"] == "closed" and a.restarts == 0
        idle(router)

    asyncio.run(scene())


def test_a_replica_that_does_not_come_back_is_restarted_and_those_who_wait_are_served():
    async def scene():
        a = Fake("a", default="gone")
        router = Router([a], replace(QUICK, retries=20))
        reply = await ask(router)
        await router.close()
        return reply.replica, a.restarts, idle(router)["failed"]

    assert asyncio.run(scene()) == ("a", 1, {})


def test_a_replica_whose_process_ended_gets_nothing_until_it_stands_again():
    """A new process takes questions in long before its engine can answer them."""

    async def scene():
        a, b = Fake("a", script=["ended"], default="hang"), Fake("b")
        a.back = asyncio.Event()
        router = Router([a, b], replace(QUICK, attempt_s=0.5))
        replies = await asyncio.gather(*(ask(router, f"q{n}") for n in range(12)))
        assert {reply.replica for reply in replies} == {"b"} and len(a.uids) <= a.slots
        assert router.stats()["replicas"][0]["state"] == "away" and a.restarts == 0
        seen = len(a.uids)
        for number in range(4):
            assert (await ask(router, f"r{number}")).replica == "b"
        with pytest.raises(JudgeUnavailable, match="a fails, and is not asked"):
            await ask(router, "only", only="a")
        assert len(a.uids) == seen
        a.default = SOUND
        a.back.set()
        await until(lambda: router.stats()["replicas"][0]["state"] != "away")
        assert (await ask(router, "later")).replica == "a"
        return idle(router)["replicas"][0]["state"]

    assert asyncio.run(scene()) == "closed"


def test_a_server_that_nobody_can_restart_is_tried_after_ever_longer_pauses():
    async def scene():
        a = Fake("a", default="gone")
        a.ours = False
        router = Router([a], replace(QUICK, breaker_failures=1, breaker_pause_s=0.05, retries=1000))
        with pytest.raises(JudgeUnavailable):
            await ask(router, left=1.0)
        await router.close()
        return len(a.uids), a.restarts

    tries, restarts = asyncio.run(scene())
    assert 2 <= restarts <= tries <= 6  # .05 + .1 + .2 + .4 + .8 s


def test_a_replica_that_was_restarted_is_not_judged_by_what_the_process_before_it_did():
    async def scene():
        a, b = Fake("a", default="gone"), Fake("b")
        router = Router([a, b], QUICK)

        async def ask_both():
            await asyncio.gather(*(ask(router, f"q{n}") for n in range(8)))

        while not a.restarts:
            await ask_both()
            await asyncio.sleep(0.01)
        await until(lambda: router.stats()["replicas"][0]["state"] == "closed")
        a.script = ["gone"]
        await ask_both()
        await asyncio.sleep(0.1)
        await router.close()
        return a.restarts, router.stats()["replicas"][0]["state"]

    assert asyncio.run(scene()) == (1, "closed")


def test_a_late_question_is_not_held_against_a_replica():
    async def scene():
        a = Fake("a", default="hang")
        router = Router([a], QUICK)
        for _ in range(4):
            with pytest.raises(JudgeUnavailable) as error:
                await ask(router, left=0.01)
            assert error.value.cause == "timeout"
        return idle(router)["replicas"][0]

    found = asyncio.run(scene())
    assert found["state"] == "closed" and found["failed"] == 0


# -- the queue, deadlines, cancellation --------------------------------------------------------------------------------


def test_a_full_queue_refuses_new_questions_but_drops_none_that_has_begun():
    async def scene():
        gate = asyncio.Event()
        a = Fake("a", slots=1)
        router = Router([a], replace(QUICK, queue=2))
        begun = router.session("begun", time.monotonic() + 20)
        await begun.ask(PROMPT)
        a.gate = gate
        waiting = [ask(router, f"q{n}") for n in range(3)]  # one runs, two wait
        await until(lambda: router.stats()["waiting"] == 2)
        with pytest.raises(JudgeUnavailable, match="2 questions wait") as error:
            await ask(router, "refused")
        assert error.value.cause == "queue_full"
        second_turn = asyncio.ensure_future(begun.ask(prompt("And now?")))
        await until(lambda: router.stats()["waiting"] == 3)
        gate.set()
        await asyncio.gather(second_turn, *waiting)
        order = [uid.split(".")[-1] for uid in a.uids]
        assert order == ["begun", "q0", "begun", "q1", "q2"]  # the oldest question first
        stats = idle(router)
        assert stats["failed"] == {"queue_full": 1} and stats["most_waiting"] == 3

    asyncio.run(scene())


def test_a_queue_of_nothing_still_uses_free_places():
    async def scene():
        router = Router([Fake("a", slots=2)], replace(QUICK, queue=0))
        asked = [ask(router, f"q{n}") for n in range(3)]
        return await asyncio.gather(*asked, return_exceptions=True)

    *served, refused = asyncio.run(scene())
    assert [reply.text for reply in served] == [SOUND, SOUND] and refused.cause == "queue_full"


def test_who_waits_past_the_deadline_hears_whether_replicas_were_busy_or_gone():
    async def scene():
        busy = Router([Fake("a", slots=1, default="hang")], QUICK)
        holder = ask(busy)
        await asyncio.sleep(0)
        with pytest.raises(JudgeUnavailable, match="no place was free") as error:
            await ask(busy, left=0.02)
        assert error.value.cause == "timeout"
        holder.cancel()
        gone = Router([Fake("a", default="gone")], replace(QUICK, breaker_failures=1, breaker_pause_s=30.0))
        with pytest.raises(JudgeUnavailable, match="was killed; no replica stood") as error:
            await ask(gone, left=0.1)
        assert error.value.cause == "unavailable"
        for _ in range(200):  # those who gave up are not kept
            with pytest.raises(JudgeUnavailable):
                await ask(gone, left=0.0)
        assert len(gone._queue) < 100
        await gone.close()

    asyncio.run(scene())


def test_cancellation_reaches_the_replica_and_frees_the_place():
    async def scene():
        a = Fake("a", default="hang", slots=1)
        router = Router([a], QUICK)
        first, second = ask(router, "q0"), ask(router, "q1")
        await until(lambda: a.running == 1)
        first.cancel()
        await until(lambda: len(a.uids) == 2)
        second.cancel()
        await asyncio.gather(first, second, return_exceptions=True)
        await until(lambda: a.running == 0)
        assert a.cancelled == 2 and idle(router)["cancelled"] == 2

    asyncio.run(scene())


@pytest.mark.parametrize("turns", range(8))
def test_a_place_given_in_the_moment_of_a_cancellation_is_not_lost(turns):
    async def scene():
        gate = asyncio.Event()
        a = Fake("a", slots=1, gate=gate)
        router = Router([a], QUICK)
        first, second = ask(router, "q0"), ask(router, "q1")
        await until(lambda: a.running == 1 and router.stats()["waiting"] == 1)
        gate.set()
        for _ in range(turns):
            await asyncio.sleep(0)
        second.cancel()
        await asyncio.gather(first, second, return_exceptions=True)
        assert (await ask(router, "q2")).text == SOUND
        idle(router)

    asyncio.run(scene())


ACTS = st.sampled_from([SOUND, FLAWED, "gone", "ended", "hang", None, REFUSED, ValueError("500")])


@settings(max_examples=40, deadline=None)
@given(
    scripts=st.lists(st.lists(ACTS, max_size=8), min_size=1, max_size=3),
    questions=st.integers(1, 16),
    cancelled=st.sets(st.integers(0, 15), max_size=4),
    slots=st.integers(1, 3),
    queue=st.sampled_from([0, 3, 100]),
)
def test_whatever_replicas_do_each_question_ends_once_and_no_place_is_lost(scripts, questions, cancelled, slots, queue):
    async def scene():
        fakes = [Fake(f"r{n}", script, slots=slots) for n, script in enumerate(scripts)]
        options = replace(QUICK, attempt_s=0.02, queue=queue, breaker_pause_s=0.005)
        router = Router(fakes, options)
        asked = [ask(router, f"q{n}", left=0.15) for n in range(questions)]
        await asyncio.sleep(0.001)
        for number in cancelled & set(range(questions)):
            asked[number].cancel()
        ends = await asyncio.gather(*asked, return_exceptions=True)
        for end in ends:
            if isinstance(end, JudgeUnavailable):
                assert end.cause in ("timeout", "unavailable", "queue_full", "garbage", "too_long")
            elif not isinstance(end, asyncio.CancelledError):
                assert end.text in (SOUND, FLAWED)  # what a replica wrote, never what stands for a failure
        stats = idle(router)
        assert stats["asked"] == questions
        assert stats["answered"] == sum(not isinstance(end, BaseException) for end in ends)
        assert stats["answered"] <= sum(one["answered"] for one in stats["replicas"])
        assert all(fake.most <= slots for fake in fakes if fake.cancelled == 0)
        assert len({uid for fake in fakes for uid in fake.uids}) == sum(len(fake.uids) for fake in fakes)
        await router.close()

    asyncio.run(scene())
