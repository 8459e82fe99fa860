"""Many processes tokenize, and the result is the same as if one did.

One process hands out items and takes results, N processes in between do the work, each behind a pipe of its own:

    parent:  send an item to whoever is idle → take whatever is ready → hand results on in the order of the items

The output therefore does not depend on N. At most a few items a worker are under way or waiting for their turn:
memory is bounded by that window. A worker has one item at a time, so that parent and worker never both wait for the
other to read.

Any end is a clean one. A failed or interrupted parent kills its workers. A killed parent cannot: each worker looks for
it a few times a second and ends when it is gone. A killed worker closes its pipe, and the parent says so.

Workers are forked, not spawned: they start in milliseconds with the tokenizer already in memory, and a script that
calls us needs no `if __name__ == "__main__"`.
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
from megalong.runtime.signals import kept_from_children

CHUNKS_UNDER_WAY = 3
PARENT_SECONDS = 0.2  # between two looks

Item = TypeVar("Item")
Result = TypeVar("Result")


def available_cores() -> int:
    """Cores this process may use: what a batch system granted, where the machine tells."""
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
        ahead: items of a worker that may be under way or done and waiting for an earlier one.
        meanwhile: called once, when all workers have something to do; what it raises is raised here.
        turns: items after which a worker gives way to a new one, as forgetful as the first; None keeps them.

    The first exception in the order of the items, be it of `task` or of `items` itself, is raised here.

    Raises:
        UserError: a worker was killed.
    """
    with _Pool(task, workers, workers * ahead, turns) as pool:
        yield from pool.run(items, meanwhile)


@contextmanager
def in_background(task: Callable[[Item], Result], item: Item) -> Iterator[Callable[[], Result]]:
    """Start `task(item)` in a process of its own; what is yielded waits for its result, or raises its exception.

    Raises:
        UserError: the process was killed.
    """
    with _Pool(task, 1, 1) as pool:
        pool.give(iter([item]))
        yield lambda: next(pool.run([]))[1]


class _Pool:
    """Workers, the items they were given, and results that came before their turn."""

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
        self.give(pending)
        if meanwhile is not None:
            meanwhile()
        for turn in count():
            self.give(pending)
            if turn not in self._items:
                return
            while turn not in self._results:
                self._take()
                self.give(pending)
            item, result = self._items.pop(turn), self._results.pop(turn)
            if isinstance(result, Exception):
                raise result
            yield item, result

    def _start_one(self) -> None:
        ours, theirs = multiprocessing.Pipe()
        # A copy of our end in a worker would keep its pipe open after our death, and the worker alive.
        inherited = [*self._processes, ours]
        context = multiprocessing.get_context("fork")
        arguments = (self._task, theirs, inherited, os.getpid())
        process = context.Process(target=_work, args=arguments, daemon=True)
        # Nor may Ctrl-C hit in the middle of a fork.
        with kept_from_children():
            process.start()
            self._processes[ours], self._done[ours] = process, 0
        theirs.close()
        self._idle.append(ours)

    def _replace(self, connection: Connection) -> None:
        """End an idle worker and start another."""
        connection.close()  # it ends at the next word it would read
        self._processes.pop(connection).join()
        del self._done[connection]
        self._start_one()

    def give(self, pending: Iterator[Any]) -> None:
        """Give items to idle workers, as far as the window allows."""
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
            with suppress(ConnectionError):  # a dead worker; `_take` says so
                connection.send(item)

    def _take(self) -> None:
        """Take the results that are there; waits until one is."""
        for connection in wait(list(self._busy)):
            assert isinstance(connection, Connection)
            try:
                result = connection.recv()
            except (EOFError, ConnectionError):
                raise UserError(
                    f"--workers {self._workers}: a worker was killed, most often for lack of memory; use fewer workers"
                ) from None
            self._results[self._busy.pop(connection)] = result
            self._done[connection] += 1
            if self._done[connection] == self._turns:
                self._replace(connection)
            else:
                self._idle.append(connection)


def _guarded(items: Iterable[Any]) -> Iterator[Any]:
    """The items; what goes wrong in reading them comes as a last item, behind those read before it."""
    try:
        yield from items
    except Exception as error:
        yield error


def _work(task: Callable[[Any], Any], connection: Connection, inherited: list[Connection], parent: int) -> None:
    for other in inherited:
        other.close()
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # its threads' locks may be held by nobody after a fork
    threading.Thread(target=_end_with, args=(parent,), daemon=True).start()
    with suppress(EOFError, ConnectionError):
        while True:
            connection.send(_outcome(task, connection.recv()))


def _end_with(parent: int) -> None:
    """End this process when its parent has ended."""
    while os.getppid() == parent:
        time.sleep(PARENT_SECONDS)
    os._exit(1)


def _outcome(task: Callable[[Any], Any], item: Any) -> Any:
    try:
        return task(item)
    except UserError as error:
        return error
    except Exception:  # a bug: its traceback must survive the pipe, whatever its type
        return RuntimeError(f"in a worker:\n{traceback.format_exc()}")
