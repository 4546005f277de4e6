"""A wait that passes its deadline says who waits for whom, and ends."""

import asyncio
import logging

import pytest

from rltk import watch
from rltk.errors import DeadlineError


async def _never():
    await asyncio.Event().wait()


def test_a_late_wait_names_both_sides_and_dumps_the_stacks(caplog):
    async def late():
        return await watch.wait(_never(), "score 3 samples", "rollout worker", "reward worker", 0.05)

    with (
        caplog.at_level(logging.ERROR),
        pytest.raises(DeadlineError, match=r"reward worker.*'score 3 samples'.*0\.05 s"),
    ):
        asyncio.run(late())
    assert "rollout worker waits for reward worker (score 3 samples)" in caplog.text
    assert "thread MainThread" in caplog.text
    assert watch.waits() == []


def test_the_late_role_is_asked_for_its_stacks(caplog):
    async def peek():
        return "stuck in verify()"

    async def late():
        return await watch.wait(_never(), "score", "a", "b", 0.05, peek=peek)

    with caplog.at_level(logging.ERROR), pytest.raises(DeadlineError):
        asyncio.run(late())
    assert "stuck in verify()" in caplog.text


def test_what_is_waited_for_can_be_listed_and_results_and_errors_come_through():
    async def look():
        waiting = asyncio.create_task(watch.wait(asyncio.sleep(0.05, "done"), "sleep", "test", "clock", 5))
        await asyncio.sleep(0.01)
        listed = watch.waits()
        return listed, await waiting

    listed, result = asyncio.run(look())
    assert result == "done"
    assert len(listed) == 1 and "test waits for clock (sleep)" in listed[0]

    async def fail():
        raise ValueError("the cause")

    with pytest.raises(ValueError, match="the cause"):
        asyncio.run(watch.wait(fail(), "fail", "test", "coroutine", 5))
