"""The time limit of math comparisons: it is heard even where one exception is lost, and leaves no timer behind."""

import signal
import time

import pytest

from rltk.rewards.time_limit import TimeLimitError, time_limit


def forever():
    while True:
        pass


class Lingers:
    def __del__(self):
        end = time.monotonic() + 0.3
        while time.monotonic() < end:
            pass


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_an_exception_lost_in_a_finalizer_is_raised_again():
    with pytest.raises(TimeLimitError, match=r"took over 0\.1 s"), time_limit(0.1):
        Lingers()
        forever()


def test_an_exception_that_the_block_swallows_is_raised_again():
    with pytest.raises(TimeLimitError), time_limit(0.1):
        try:
            forever()
        except TimeLimitError:
            forever()


def test_leaving_restores_the_handler_and_the_timer_that_was_running():
    def heard(signum, frame): ...

    before = signal.signal(signal.SIGPROF, heard)
    timer = signal.setitimer(signal.ITIMER_PROF, 200)
    try:
        with time_limit(5):
            pass
        assert signal.getsignal(signal.SIGPROF) is heard
        assert 190 < signal.getitimer(signal.ITIMER_PROF)[0] <= 201  # it counts in ticks
    finally:
        signal.setitimer(signal.ITIMER_PROF, *timer)
        signal.signal(signal.SIGPROF, before)


def test_a_block_in_time_is_left_alone():
    with time_limit(0.05):
        value = 1
    time.sleep(0.2)
    assert value == 1


def test_waiting_for_a_busy_machine_does_not_count():
    waited = False
    with time_limit(0.1):
        time.sleep(0.3)
        waited = True
    assert waited
