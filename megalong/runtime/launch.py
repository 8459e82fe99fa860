"""Local processes for `--nproc N`: what torchrun does on one machine, without its agent.

Each process runs `python -m megalong …` with RANK, WORLD_SIZE and a rendezvous on 127.0.0.1. When one fails, the others
are ended at once, and its exit status is ours (torchrun would turn a user's mistake, status 2, into 1). They never
outlive this process, however it ends: otherwise they would write into the run folder together with the run's next
start.
"""

from __future__ import annotations

import ctypes
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from types import FrameType
from typing import Any

from megalong.runtime.checkout import same_code

_PR_SET_PDEATHSIG = 1  # linux/prctl.h
# Looked up here, because nothing may be looked up between fork and exec. Only Linux has it.
_prctl = getattr(ctypes.CDLL(None), "prctl", None)


def run_local(arguments: Sequence[str], nproc: int) -> int:
    """Run `python -m megalong ARGUMENTS` in `nproc` processes; returns the exit status.

    SIGINT, SIGTERM and SIGUSR1 are passed on to every process; the processes then end by themselves.
    """
    port = _free_port()
    processes: list[subprocess.Popen[bytes]] = []
    signals, previous = _forward_signals(processes)
    try:
        for rank in range(nproc):
            processes.append(_spawn(arguments, rank, nproc, port))
        if signals:  # received before all processes were started
            for process in processes:
                process.send_signal(signals[0])
        return _wait(processes)
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
        _end(processes)


def _spawn(arguments: Sequence[str], rank: int, nproc: int, port: int) -> subprocess.Popen[bytes]:
    environment = dict(os.environ)
    environment.update(
        same_code(),
        RANK=str(rank),
        LOCAL_RANK=str(rank),
        WORLD_SIZE=str(nproc),
        LOCAL_WORLD_SIZE=str(nproc),
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
    )
    # Every process would otherwise start one thread per core and compete with the others.
    environment.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // nproc)))
    return subprocess.Popen([sys.executable, "-m", "megalong", *arguments], env=environment, preexec_fn=_prepare_child)


def _prepare_child() -> None:
    """Make the kernel end this process when its parent is gone, even by SIGKILL, which a parent cannot pass on.

    SIGINT is blocked until the child can handle it (`__main__.py`): during its start, Python would print a traceback.
    """
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    if _prctl is not None:
        # Not SIGTERM, on which a run finishes its step and saves.
        _prctl(_PR_SET_PDEATHSIG, int(signal.SIGKILL))


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _forward_signals(processes: Sequence[subprocess.Popen[bytes]]) -> tuple[list[int], dict[int, Any]]:
    """A list that collects received signals, and the previous handlers."""
    signals: list[int] = []

    def forward(number: int, frame: FrameType | None) -> None:
        signals.append(number)
        for process in processes:
            if process.poll() is None:
                process.send_signal(number)

    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
    return signals, {number: signal.signal(number, forward) for number in numbers}


def _wait(processes: Sequence[subprocess.Popen[bytes]]) -> int:
    while True:
        statuses = [process.poll() for process in processes]
        failed = [status for status in statuses if status]
        if failed:
            # Every rank finds a user's mistake; let the one that prints it finish before it is ended.
            time.sleep(0.5)
            return min((status for status in failed if status > 0), default=128 - failed[0])
        if all(status == 0 for status in statuses):
            return 0
        time.sleep(0.05)


def _end(processes: Sequence[subprocess.Popen[bytes]]) -> None:
    """Kill the remaining processes, even if blocked in a collective: on SIGTERM they would go on and save."""
    for process in processes:
        if process.poll() is None:
            process.kill()
    for process in processes:
        process.wait()
