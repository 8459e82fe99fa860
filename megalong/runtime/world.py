"""Join and leave the world of processes that a launcher started: for training, evaluation and conversion."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch

from megalong.runtime import distributed
from megalong.runtime.grid import Grid
from megalong.runtime.logs import close_logging, setup_logging


@contextlib.contextmanager
def world(device: torch.device, grid: Grid | None = None, timeout_minutes: float = 60) -> Iterator[None]:
    """Join all processes that a launcher started with this one, or run alone.

    Megatron-Core may be imported only inside. Afterwards nothing stays initialized.

    Args:
        grid: how the processes share a model; None if the caller calls `distributed.set_grid`.
        timeout_minutes: for every collective.

    Raises:
        UserError: the world cannot be joined, or its size is not a multiple of the grid's TP × CP × PP.
    """
    distributed.start(device, timeout_minutes)
    try:
        if grid is not None:
            distributed.set_grid(grid)
        yield
    finally:
        distributed.stop()


@contextlib.contextmanager
def console_logging() -> Iterator[None]:
    """Log to the terminal: all lines of rank 0, warnings of other ranks."""
    setup_logging(distributed.environment_world()[0])
    try:
        yield
    finally:
        close_logging()
