"""Join the world of processes that this one was started in, and leave it again: training, evaluation, conversion."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch

from megalong.runtime import distributed
from megalong.runtime.grid import Grid
from megalong.runtime.logs import close_logging, setup_logging


@contextlib.contextmanager
def world(device: torch.device, grid: Grid | None = None, timeout_minutes: float = 60) -> Iterator[None]:
    """All processes that a launcher started with this one, or this one alone.

    Megatron-Core may be imported only inside. Nothing stays initialized behind.

    Args:
        grid: how they share a model; None: the caller calls `distributed.set_grid`.
        timeout_minutes: for every collective.

    Raises:
        UserError: the world cannot be joined, or does not hold whole replicas of `grid`.
    """
    distributed.start(device, timeout_minutes)
    try:
        if grid is not None:
            distributed.set_grid(grid)
        yield
    finally:
        distributed.stop()


@contextlib.contextmanager
def logged() -> Iterator[None]:
    """Log lines go to the terminal: all of rank 0, warnings of the others."""
    setup_logging(distributed.environment_world()[0])
    try:
        yield
    finally:
        close_logging()
