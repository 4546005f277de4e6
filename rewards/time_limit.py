"""A limit on the CPU time of Python code in the main thread, by a timer that goes on until it is heard."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

# One exception is not enough: raised while a finalizer or a garbage collector's callback happens to run, it is printed
# and dropped, and a computation that was to take three seconds takes an hour.
AGAIN_S = 0.1


class TimeLimitError(BaseException):
    """The block took more than its limit. Not an Exception: sympy swallows those on many of its ways."""


@contextmanager
def time_limit(seconds: float) -> Iterator[None]:
    """Raises TimeLimitError in the block once this process has computed for `seconds`, and every 0.1 s from then until
    it is left.

    CPU seconds, as a busy machine makes no right answer wrong; whoever waits for the block has a clock of their own.
    Main thread only (SIGPROF). A single call into C code is deaf to it; end its process for that. A timer that was
    already running goes on where it stood.
    """
    over = False

    def expired(signum: int, frame: Any) -> None:
        if not over:
            raise TimeLimitError(f"took over {seconds} s")

    handler_before = signal.signal(signal.SIGPROF, expired)
    timer_before = signal.setitimer(signal.ITIMER_PROF, seconds, AGAIN_S)
    try:
        try:
            yield
        finally:
            over = True
    finally:  # apart, as the timer may still be heard at the line above
        signal.setitimer(signal.ITIMER_PROF, *timer_before)
        signal.signal(signal.SIGPROF, handler_before)
