"""Worker processes that stay alive between tests, so that a distributed test costs milliseconds, not a torch import.

`pool.run(2, "tests.attention.workers:ring", length)` opens a fresh gloo group on the first two workers, calls
`ring(length)` on both, closes the group and returns `[result of rank 0, result of rank 1]`:

    test process ── pipe ──> worker 0  init_process_group -> ring(length) -> destroy_process_group
                 ── pipe ──> worker 1  the same

Workers are forked from a process that has imported what they need (tests/ranks.py). The function is named, not passed,
so a worker imports it itself and nothing of the test is pickled but arguments. Each worker computes on one thread. What
the function changes in its process beyond the group (Megatron's `parallel_state`, seeds, environment) it must put back
itself; the pool restarts workers only after a failure.
"""

import faulthandler
import importlib
import os
import pickle
import socket
import tempfile
import time
import traceback
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from typing import Any, Self

from tests.ranks import forkserver

GRACE_SECONDS = 3.0  # how long the other ranks may take to answer once one of them has failed


class RankError(RuntimeError):
    """A rank raised, died or hung. The message names the rank and carries its traceback, or where it stood."""


@dataclass
class _Worker:
    process: BaseProcess
    connection: Connection


@dataclass
class _Task:
    rank: int
    world_size: int
    target: str
    arguments: tuple[Any, ...]
    folder: str  # of this call: the store, and what a rank that hangs writes
    timeout: float

    @property
    def stood(self) -> str:
        """The file that says where a rank stood shortly before the timeout."""
        return os.path.join(self.folder, f"rank-{self.rank}")


class WorkerPool:
    """Up to `max_workers` processes, started when first needed; usable as a context manager."""

    def __init__(self, max_workers: int = 4) -> None:
        self.max_workers = max_workers
        self._workers: list[_Worker] = []

    def run(self, world_size: int, target: str, *arguments: Any, timeout: float = 240.0) -> list[Any]:
        """Call `target` ("package.module:function") on `world_size` ranks; return their results, rank 0 first.

        Arguments and results must be picklable. `timeout` (seconds) bounds the whole call. Raises `RankError` with
        the first failure; the workers concerned are then ended, and new ones started by the next call.
        """
        if not 1 <= world_size <= self.max_workers:
            raise ValueError(f"world_size={world_size}: this pool has 1 to {self.max_workers} workers")
        self._start_up_to(world_size)
        with tempfile.TemporaryDirectory(prefix="pool-") as folder:
            tasks = [_Task(rank, world_size, target, arguments, folder, timeout) for rank in range(world_size)]
            for task, worker in zip(tasks, self._workers, strict=False):
                worker.connection.send_bytes(pickle.dumps(task))
            try:
                return self._collect(tasks)
            except BaseException:
                self.close()
                raise

    def close(self) -> None:
        """End all workers. The pool stays usable: the next `run` starts new ones."""
        for worker in self._workers:
            worker.process.kill()
        for worker in self._workers:
            worker.process.join()
            worker.connection.close()
        self._workers.clear()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _start_up_to(self, count: int) -> None:
        context = forkserver()
        while len(self._workers) < count:
            ours, theirs = context.Pipe()
            process = context.Process(target=_serve, args=(theirs,), daemon=True)
            process.start()
            theirs.close()  # so that a dead worker reads as end-of-file here
            self._workers.append(_Worker(process, ours))

    def _collect(self, tasks: list[_Task]) -> list[Any]:
        """Wait for every rank; after the first failure, give the others a moment and raise that failure."""
        world_size, target, timeout = len(tasks), tasks[0].target, tasks[0].timeout
        ranks = {worker.connection: rank for rank, worker in enumerate(self._workers[:world_size])}
        results: dict[int, Any] = {}
        failures: list[tuple[float, str]] = []  # when, what
        deadline = time.monotonic() + timeout
        while ranks:
            ready = wait(list(ranks), max(0.0, deadline - time.monotonic()))
            if not ready:
                silent = f"rank(s) {sorted(ranks.values())} of {target} gave no answer within {timeout:g} s"
                silent += "".join(_where_it_stood(tasks[rank]) for rank in sorted(ranks.values()))
                failures.append((time.monotonic(), silent))
                break
            for connection in ready:
                assert isinstance(connection, Connection)
                rank = ranks.pop(connection)
                succeeded, moment, answer = self._receive(connection, rank)
                if succeeded:
                    results[rank] = answer
                else:
                    failures.append((moment, f"rank {rank} of {world_size} failed in {target}\n{answer}"))
                    deadline = min(deadline, time.monotonic() + GRACE_SECONDS)
        if failures:
            raise RankError(min(failures)[1])  # the later ones are mostly "connection closed by peer"
        return [results[rank] for rank in range(world_size)]

    def _receive(self, connection: Connection, rank: int) -> tuple[bool, float, Any]:
        try:
            # plain pickle: multiprocessing's own would pass tensors as shared memory that dies with the worker
            succeeded, moment, answer = pickle.loads(connection.recv_bytes())
            return succeeded, moment, answer
        except (EOFError, ConnectionResetError):
            process = self._workers[rank].process
            process.join()
            # it fell silent before it could note the time, and before any rank that missed it
            return False, 0.0, f"the process died with exit code {process.exitcode}"


def _where_it_stood(task: _Task) -> str:
    try:
        with open(task.stood) as file:
            return f"\nrank {task.rank} stood at\n{file.read()}"
    except OSError:
        return ""


def _serve(connection: Connection) -> None:
    """A worker's life: answer tasks until the other end of the pipe is gone, or until one fails.

    A failure ends the process: its closed connections free ranks that wait for it in a collective. The answer says
    when it happened, so that the cause can be told from what followed.
    """
    if any(name == "lo" for _, name in socket.if_nameindex()):
        os.environ["GLOO_SOCKET_IFNAME"] = "lo"  # the machine's own name need not resolve
    import torch

    torch.set_num_threads(1)
    while True:
        try:
            task = pickle.loads(connection.recv_bytes())
        except (EOFError, ConnectionResetError):
            return
        try:
            with open(task.stood, "w") as file:
                faulthandler.dump_traceback_later(0.8 * task.timeout, file=file)
                try:
                    answer = pickle.dumps((True, 0.0, _perform(task)))
                finally:
                    faulthandler.cancel_dump_traceback_later()
        except BaseException:  # even SystemExit is an answer the test must see
            connection.send_bytes(pickle.dumps((False, time.monotonic(), traceback.format_exc())))
            return
        connection.send_bytes(answer)


def _perform(task: _Task) -> Any:
    from datetime import timedelta

    import torch.distributed as dist

    module, function = task.target.split(":")
    dist.init_process_group(
        "gloo",
        init_method=f"file://{os.path.join(task.folder, 'store')}",
        rank=task.rank,
        world_size=task.world_size,
        timeout=timedelta(seconds=task.timeout),
    )
    result = getattr(importlib.import_module(module), function)(*task.arguments)
    if dist.is_initialized():  # the function may have closed it
        dist.destroy_process_group()
    return result
