"""Processes of a real `megalong`, without its seconds of imports: forked from a process that has done them.

test process ──▶ forkserver (torch, Megatron-Core and megalong imported) ──fork──▶ rank 0, rank 1
"""

from __future__ import annotations

import importlib
import multiprocessing
import os
import socket
import subprocess
import sys
import tempfile
from collections.abc import Callable
from multiprocessing.context import ForkServerContext
from multiprocessing.process import BaseProcess
from pathlib import Path


def forkserver() -> ForkServerContext:
    """Forks processes that have everything imported from a server, which the first of them starts."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.ranks_preload"])
    return context


def start_ranks(
    arguments: list[str],
    world: int,
    log: Path,
    before: str | None = None,
    own: Callable[[int], dict[str, str]] = lambda rank: {},
) -> list[BaseProcess]:
    """Start `megalong ARGUMENTS` on `world` ranks, as a launcher does; what they print is appended to `log`.

    `before`: "package.module:function", called by each rank first, to make something go wrong later. `own`: variables
    of each rank, beside those that a launcher sets, or instead.
    """
    context = forkserver()
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    ranks = []
    for rank in range(world):
        variables = {
            "RANK": str(rank),
            "LOCAL_RANK": str(rank),
            "WORLD_SIZE": str(world),
            "LOCAL_WORLD_SIZE": str(world),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
            **own(rank),
        }
        ranks.append(
            context.Process(target=_command, args=(arguments, variables, (str(log), str(log)), before), daemon=True)
        )
    for one in ranks:
        one.start()
    return ranks


def megalong(*arguments: object, before: str | None = None) -> subprocess.CompletedProcess[str]:
    """Run `megalong ARGUMENTS` in a process of its own, as a shell does; its exit status and what it printed.

    `before` as for `start_ranks`.
    """
    with tempfile.TemporaryDirectory(prefix="megalong-") as folder:
        words, outputs = [str(one) for one in arguments], (f"{folder}/stdout", f"{folder}/stderr")
        process = forkserver().Process(target=_command, args=(words, {}, outputs, before), daemon=False)
        process.start()
        (status,) = finish([process])
        stdout, stderr = (Path(output).read_text() for output in outputs)
        return subprocess.CompletedProcess(words, -1 if status is None else status, stdout, stderr)


def end_ranks(ranks: list[BaseProcess]) -> None:
    """SIGKILL to all that still run, as a launcher does when one has died."""
    for one in ranks:
        one.kill()
    for one in ranks:
        one.join()


def finish(ranks: list[BaseProcess], seconds: float = 120) -> list[int | None]:
    """Wait for all to end by themselves; their exit statuses."""
    for one in ranks:
        one.join(seconds)
    statuses = [one.exitcode for one in ranks]
    end_ranks(ranks)
    return statuses


def _command(arguments: list[str], variables: dict[str, str], outputs: tuple[str, str], before: str | None) -> None:
    """What a forked process does: `outputs` are the files that its stdout and stderr are appended to."""
    import torch

    for descriptor, output in enumerate(outputs, 1):
        os.dup2(os.open(output, os.O_WRONLY | os.O_CREAT | os.O_APPEND), descriptor)
    sys.stdout = open(1, "w", buffering=1, closefd=False)  # noqa: SIM115
    sys.stderr = open(2, "w", buffering=1, closefd=False)  # noqa: SIM115
    os.environ.update(variables)
    torch.set_num_threads(1)
    if before is not None:
        module, function = before.split(":")
        getattr(importlib.import_module(module), function)()
    from megalong.cli import main

    sys.exit(main(arguments))
