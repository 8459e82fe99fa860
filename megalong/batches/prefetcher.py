"""Compute items in background threads and return them in order.

Threads are enough: reading and copying tokens releases the GIL, threads start at once, and their results need no copy
from another process. For any number of threads, item i depends only on the number i and is returned as the i-th.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Generic, TypeVar

T = TypeVar("T")


class Prefetcher(Generic[T]):
    """make(0), make(1), make(2), … in order.

    Args:
        make: called in `workers` threads; with one worker, in order and one call at a time.
        depth: number of items made in advance; with 0, `next` makes each item in the caller's thread.
    """

    def __init__(self, make: Callable[[int], T], depth: int, workers: int = 1) -> None:
        self._make, self._depth = make, depth
        self._started = 0
        self._waiting: deque[Future[T]] = deque()
        self._threads = ThreadPoolExecutor(workers, thread_name_prefix="reader") if depth else None
        self._fill()

    def next(self) -> T:
        """Wait for the next item and return it, or raise what `make` raised."""
        if self._threads is None:
            self._started += 1
            return self._make(self._started - 1)
        made = self._waiting.popleft()
        self._fill()
        return made.result()

    def close(self) -> None:
        """Make no more items; waits for those in progress."""
        if self._threads is not None:
            self._threads.shutdown(wait=True, cancel_futures=True)
        self._waiting.clear()

    def _fill(self) -> None:
        while self._threads is not None and len(self._waiting) < self._depth:
            self._waiting.append(self._threads.submit(self._make, self._started))
            self._started += 1
