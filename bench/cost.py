"""What a piece of work costs: its seconds, and the bytes of memory at its peak over what was there before.

Seconds are those that pass on a GPU, from idle to idle, and those of the one CPU thread elsewhere: on a machine with
other work they do not depend on it. Bytes are those of tensors, as torch's allocator has them.
"""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable

import torch
from torch.profiler import ProfilerActivity, profile

Work = Callable[[], object]

os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # torch's profiler reports its starts and stops


def costs(works: dict[str, Work], device: torch.device, repeats: int) -> dict[str, tuple[float, int]]:
    """{name: (median of its seconds, bytes)}. Repeats go round robin: a machine that slows down slows all alike."""
    for work in works.values():  # the allocator and the libraries ask for what is theirs the first time
        work()
    seconds: dict[str, list[float]] = {name: [] for name in works}
    for _ in range(repeats):
        for name, work in works.items():
            seconds[name].append(_seconds(work, device))
    peak = _peak_on_gpu if device.type == "cuda" else _peak_on_cpu
    return {name: (statistics.median(seconds[name]), peak(work)) for name, work in works.items()}


def kernels(work: Work) -> tuple[int, float]:
    """(number of kernels and copies on the GPU, their seconds): what is left of `work` where the host runs ahead."""
    with profile(activities=[ProfilerActivity.CUDA]) as found:
        work()
        torch.cuda.synchronize()
    events = [event for event in found.events() or () if event.device_type.name == "CUDA"]
    return len(events), 1e-6 * sum(event.time_range.elapsed_us() for event in events)


def _seconds(work: Work, device: torch.device) -> float:
    if device.type != "cuda":
        start = time.process_time()
        work()
        return time.process_time() - start
    torch.cuda.synchronize()
    start = time.perf_counter()
    work()
    torch.cuda.synchronize()
    return time.perf_counter() - start


def _peak_on_gpu(work: Work) -> int:
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    work()
    return torch.cuda.max_memory_allocated() - before


def _peak_on_cpu(work: Work) -> int:
    """Torch keeps no count on a CPU, but its profiler sees every allocation and release."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as found:
        work()
    assert found.profiler is not None and found.profiler.kineto_results is not None
    events = [event for event in found.profiler.kineto_results.events() if event.name() == "[memory]"]
    held = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        held += event.nbytes()  # pyright: ignore[reportAttributeAccessIssue]
        peak = max(peak, held)
    return peak
