"""A pool of processes that returns results in order, so the output does not depend on the number of processes.

The parent sends items to N workers and collects their results, through one pipe per worker:

    parent:  send an item to an idle worker → collect a result that is ready → yield results in the order of the items

At most a few items per worker are in progress or wait for an earlier one, which bounds memory. A worker has one item at
a time, so that parent and worker never both wait for the other to read.

No worker outlives its parent. A failed or interrupted parent kills its workers. A killed parent cannot, so each worker
checks for its parent a few times a second and exits when it is gone. A killed worker closes its pipe, and the parent
reports it.

Workers are forked, not spawned: they start in milliseconds with the tokenizer already in memory, and the calling script
needs no `if __name__ == "__main__"`.
"""

import multiprocessing
import os
import threading
import time
import traceback
from collections.abc import Callable, Generator, Iterable, Iterator
from contextlib import contextmanager, suppress
from itertools import count
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from typing import Any, Self, TypeVar

from megalong.errors import UserError
from megalong.runtime.signals import sigint_blocked_for_children

CHUNKS_UNDER_WAY = 3
PARENT_SECONDS = 0.2  # between two checks for the parent

Item = TypeVar("Item")
Result = TypeVar("Result")


def available_cores() -> int:
    """Cores that this process may use: its CPU affinity, which a batch system may limit, else all cores."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def map_in_order(
    task: Callable[[Item], Result],
    items: Iterable[Item],
    workers: int,
    ahead: int = CHUNKS_UNDER_WAY,
    meanwhile: Callable[[], None] | None = None,
    turns: int | None = None,
) -> Generator[tuple[Item, Result], None, None]:
    """(item, task(item)) for every item, in order, computed by `workers` processes.

    Args:
        ahead: items per worker that may be in progress, or done and waiting for an earlier one.
        meanwhile: called once, when all workers are busy; its exceptions are raised here.
        turns: items after which a worker is replaced by a new process, to free its memory; None: never.

    Of the exceptions of `task` and of `items`, the first in the order of the items is raised here.

    Raises:
        UserError: a worker was killed.
    """
    with _Pool(task, workers, workers * ahead, turns) as pool:
        yield from pool.run(items, meanwhile)


@contextmanager
def in_background(task: Callable[[Item], Result], item: Item) -> Iterator[Callable[[], Result]]:
    """Start `task(item)` in another process. Yields a function that waits for its result or raises its exception.

    Raises:
        UserError: the process was killed.
    """
    with _Pool(task, 1, 1) as pool:
        pool.send(iter([item]))
        yield lambda: next(pool.run([]))[1]


class _Pool:
    """The workers, the items sent to them, and results that wait for an earlier item."""

    def __init__(self, task: Callable[[Any], Any], workers: int, window: int, turns: int | None = None) -> None:
        self._task, self._workers, self._window, self._turns = task, workers, window, turns
        self._processes: dict[Connection, BaseProcess] = {}
        self._done: dict[Connection, int] = {}
        self._idle: list[Connection] = []
        self._busy: dict[Connection, int] = {}
        self._items: dict[int, Any] = {}
        self._results: dict[int, Any] = {}
        self._given = 0

    def __enter__(self) -> Self:
        for _ in range(self._workers):
            self._start_one()
        return self

    def __exit__(self, *_: object) -> None:
        for process in self._processes.values():
            process.kill()
        for process in self._processes.values():
            process.join()

    def run(self, items: Iterable[Any], meanwhile: Callable[[], None] | None = None) -> Iterator[tuple[Any, Any]]:
        """(item, result) in order."""
        pending = _guarded(items)
        self.send(pending)
        if meanwhile is not None:
            meanwhile()
        for turn in count():
            self.send(pending)
            if turn not in self._items:
                return
            while turn not in self._results:
                self._collect()
                self.send(pending)
            item, result = self._items.pop(turn), self._results.pop(turn)
            if isinstance(result, Exception):
                raise result
            yield item, result

    def _start_one(self) -> None:
        ours, theirs = multiprocessing.Pipe()
        # A copy of our end in a worker would keep its pipe open after our exit, and the worker alive.
        inherited = [*self._processes, ours]
        context = multiprocessing.get_context("fork")
        arguments = (self._task, theirs, inherited, os.getpid())
        process = context.Process(target=_work, args=arguments, daemon=True)
        # Ctrl-C must not interrupt a fork.
        with sigint_blocked_for_children():
            process.start()
            self._processes[ours], self._done[ours] = process, 0
        theirs.close()
        self._idle.append(ours)

    def _replace(self, connection: Connection) -> None:
        """Stop an idle worker and start another."""
        connection.close()  # the worker exits when it tries to read its next item
        self._processes.pop(connection).join()
        del self._done[connection]
        self._start_one()

    def send(self, pending: Iterator[Any]) -> None:
        """Send items to idle workers, as far as the window allows."""
        while self._idle and len(self._items) < self._window:
            item = next(pending, None)
            if item is None:
                return
            number, self._given = self._given, self._given + 1
            self._items[number] = item
            if isinstance(item, Exception):
                self._results[number] = item
                return
            connection = self._idle.pop()
            self._busy[connection] = number
            with suppress(ConnectionError):  # a dead worker; `_collect` reports it
                connection.send(item)

    def _collect(self) -> None:
        """Collect the results that are ready; waits for at least one."""
        for connection in wait(list(self._busy)):
            assert isinstance(connection, Connection)
            try:
                result = connection.recv()
            except (EOFError, ConnectionError):
                raise UserError(
                    f"--workers {self._workers}: a worker was killed, probably out of memory; use fewer workers"
                ) from None
            self._results[self._busy.pop(connection)] = result
            self._done[connection] += 1
            if self._done[connection] == self._turns:
                self._replace(connection)
            else:
                self._idle.append(connection)


def _guarded(items: Iterable[Any]) -> Iterator[Any]:
    """The items; an exception while reading them becomes the last item."""
    try:
        yield from items
    except Exception as error:
        yield error


def _work(task: Callable[[Any], Any], connection: Connection, inherited: list[Connection], parent: int) -> None:
    for other in inherited:
        other.close()
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # after a fork its locks may belong to threads that are gone
    threading.Thread(target=_exit_with, args=(parent,), daemon=True).start()
    with suppress(EOFError, ConnectionError):
        while True:
            connection.send(_outcome(task, connection.recv()))


def _exit_with(parent: int) -> None:
    """Exit when the parent process is gone."""
    while os.getppid() == parent:
        time.sleep(PARENT_SECONDS)
    os._exit(1)


def _outcome(task: Callable[[Any], Any], item: Any) -> Any:
    try:
        return task(item)
    except UserError as error:
        return error
    except Exception:  # a bug: send its traceback as text, since the exception itself may not pickle
        return RuntimeError(f"in a worker:\n{traceback.format_exc()}")
