"""Ctrl-C in two steps: the first asks, the second insists."""

from __future__ import annotations

import contextlib
import signal
from collections.abc import Callable, Iterator
from typing import Any


@contextlib.contextmanager
def first_interrupt_calls(ask: Callable[[], None]) -> Iterator[None]:
    """Within the block the first SIGINT or SIGTERM calls `ask`; another one raises KeyboardInterrupt."""
    seen = 0

    def handle(signum: int, frame: Any) -> None:
        nonlocal seen
        seen += 1
        if seen > 1:
            raise KeyboardInterrupt
        ask()

    before = []
    with contextlib.suppress(ValueError):  # not on the main thread: whoever runs us there handles signals
        before = [(number, signal.signal(number, handle)) for number in (signal.SIGINT, signal.SIGTERM)]
    try:
        yield
    finally:
        for number, handler in before:
            signal.signal(number, handler)
