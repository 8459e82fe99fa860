"""Time and memory of work on a device, by the device's own clock.

Work on a GPU is asynchronous, so each repetition is timed between two events, and the result is the median. On a CPU,
where this code can be tried at tiny sizes, the wall clock is used.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch

MOST_REPETITIONS = 50
GIB = 2.0**30


def wait_for(device: torch.device) -> None:
    """Return when all work queued on `device` is done."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def one_time(work: Callable[[], Any], device: torch.device) -> float:
    """Seconds that one call of `work` takes on `device`."""
    if device.type != "cuda":
        started = time.perf_counter()
        work()
        return time.perf_counter() - started
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    work()
    end.record()
    torch.cuda.synchronize(device)
    return float(begin.elapsed_time(end)) / 1e3


def median_time(work: Callable[[], Any], device: torch.device, seconds: float = 2.0, warm_up: bool = True) -> float:
    """Median seconds of a call of `work`, repeated for about `seconds` and at least once.

    Args:
        warm_up: call it once before, to load modules, compile and allocate.
    """
    if warm_up:
        work()
    first = one_time(work, device)
    more = min(MOST_REPETITIONS, int(seconds / max(first, 1e-9))) - 1
    return statistics.median([first, *(one_time(work, device) for _ in range(more))])


def matmul_rate(device: torch.device) -> float:
    """FLOP/s of a product of square bf16 matrices: the rate that this chip reaches, unlike that of a data sheet."""
    size = 8192 if device.type == "cuda" else 256
    a, b = (torch.randn(size, size, device=device, dtype=torch.bfloat16) for _ in range(2))
    return 2 * size**3 / median_time(lambda: a @ b, device, 0.5)


def copy_rate(device: torch.device) -> float:
    """Bytes/s of a copy within the device's memory; bytes read and bytes written are counted."""
    size = 1 << (32 if device.type == "cuda" else 20)
    source = torch.empty(size, dtype=torch.uint8, device=device).random_()
    target = torch.empty_like(source)
    return 2 * size / median_time(lambda: target.copy_(source), device, 0.3)


def forget_peak(device: torch.device) -> None:
    """Reset the peak of memory."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether the device ran out of memory; cuBLAS and cuDNN have their own messages for it."""
    message = str(error).lower()
    return isinstance(error, torch.OutOfMemoryError) or "out of memory" in message or "alloc_failed" in message
