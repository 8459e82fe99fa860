"""Many processes tokenize, and the result is the same as if one did.

One process reads chunks and writes results, N processes in between decode and tokenize. Results are taken in the
order of the chunks, whoever finished first, so the output does not depend on N. At most a few chunks a worker are
under way at any time: memory is bounded by that window, not by the corpus.

Workers are forked and not spawned: they start in milliseconds with the tokenizer already in memory, and a script that
calls us needs no `if __name__ == "__main__"`.
"""

import multiprocessing
import os
import signal
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from typing import Any, TypeVar

from megalong.errors import UserError

CHUNKS_UNDER_WAY = 3  # a worker: one in work, one waiting, one done and not yet written


def available_cores() -> int:
    """Cores this process may use: what a batch system granted, where the machine tells."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


Item = TypeVar("Item")
Result = TypeVar("Result")

_task: Callable[[Any], Any]  # set in each worker when it starts


def map_in_order(task: Callable[[Item], Result], items: Iterable[Item], workers: int) -> Iterator[tuple[Item, Result]]:
    """(item, task(item)) for every item, in order, computed by `workers` processes.

    The first exception, in the order of the items, of `task` or of `items` itself is raised here.

    Raises:
        UserError: a worker was killed.
    """
    executor = ProcessPoolExecutor(workers, multiprocessing.get_context("fork"), _start, (task, os.getpid()))
    with _serial_tokenizers():
        try:
            yield from _windowed(executor, items, workers * CHUNKS_UNDER_WAY)
        except BrokenProcessPool:
            raise UserError(
                f"--workers {workers}: a worker was killed, most often for lack of memory; use fewer workers"
            ) from None
        finally:
            executor.shutdown(cancel_futures=True)


def _windowed(executor: ProcessPoolExecutor, items: Iterable[Item], window: int) -> Iterator[tuple[Item, Any]]:
    under_way: deque[tuple[Item, Future[Any]]] = deque()
    failure: Exception | None = None
    pending = iter(items)
    while True:
        while failure is None and len(under_way) < window:
            try:
                item = next(pending)
            except StopIteration:
                break
            except Exception as error:  # what was read before comes first, it may hold an earlier mistake
                failure = error
                break
            under_way.append((item, executor.submit(_run, item)))
        if not under_way:
            break
        item, future = under_way.popleft()
        yield item, future.result()
    if failure is not None:
        raise failure


def _start(task: Callable[[Any], Any], parent: int) -> None:
    global _task
    _task = task
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches every process; the parent ends the workers
    threading.Thread(target=_end_with, args=(parent,), daemon=True).start()


def _end_with(parent: int) -> None:
    """A killed parent cannot end its workers: they look whether it is still there."""
    while os.getppid() == parent:
        time.sleep(0.5)
    os._exit(1)


def _run(item: Any) -> Any:
    return _task(item)


@contextmanager
def _serial_tokenizers() -> Iterator[None]:
    """`tokenizers` must not use its own threads in forked processes, where its locks may be held by nobody."""
    name = "TOKENIZERS_PARALLELISM"
    before = os.environ.get(name)
    os.environ[name] = "false"
    try:
        yield
    finally:
        if before is None:
            del os.environ[name]
        else:
            os.environ[name] = before
