"""Ranks of a real `megalong train`, without its seconds of imports: forked from a process that has done them.

test process ──▶ forkserver (torch, Megatron-Core and megalong imported) ──fork──▶ rank 0, rank 1
"""

from __future__ import annotations

import importlib
import multiprocessing
import os
import socket
import sys
from collections.abc import Callable
from multiprocessing.process import BaseProcess
from pathlib import Path


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
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.ranks_preload"])
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
        ranks.append(context.Process(target=_rank, args=(arguments, variables, str(log), before), daemon=True))
    for one in ranks:
        one.start()
    return ranks


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


def _rank(arguments: list[str], variables: dict[str, str], log: str, before: str | None) -> None:
    import torch

    output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(output, 1)
    os.dup2(output, 2)
    sys.stderr = sys.stdout = open(2, "w", buffering=1, closefd=False)  # noqa: SIM115
    os.environ.update(variables)
    torch.set_num_threads(1)
    if before is not None:
        module, function = before.split(":")
        getattr(importlib.import_module(module), function)()
    from megalong.cli import main

    sys.exit(main(arguments))
