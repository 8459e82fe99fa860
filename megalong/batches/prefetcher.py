"""Compute items in background threads and return them in order.

Threads are enough: reading and copying tokens leaves Python's lock, they start at once, and what they make needs no
copy from another process. However many there are, thing i is made from the number i alone and comes as the i-th.
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
        make: called in `workers` threads; with one worker in order, one call at a time.
        depth: how many are made before they are asked for; 0 makes each when it is asked for, in the asking thread.
    """

    def __init__(self, make: Callable[[int], T], depth: int, workers: int = 1) -> None:
        self._make, self._depth = make, depth
        self._started = 0
        self._waiting: deque[Future[T]] = deque()
        self._threads = ThreadPoolExecutor(workers, thread_name_prefix="reader") if depth else None
        self._fill()

    def next(self) -> T:
        """The next one; waits for it, and raises what its making raised."""
        if self._threads is None:
            self._started += 1
            return self._make(self._started - 1)
        made = self._waiting.popleft()
        self._fill()
        return made.result()

    def close(self) -> None:
        """Make no more; waits for those that are being made."""
        if self._threads is not None:
            self._threads.shutdown(wait=True, cancel_futures=True)
        self._waiting.clear()

    def _fill(self) -> None:
        while self._threads is not None and len(self._waiting) < self._depth:
            self._waiting.append(self._threads.submit(self._make, self._started))
            self._started += 1
