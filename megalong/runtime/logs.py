"""One log line format, for the terminal and the run folder.

    2026-01-31 12:00:00 step 120/480 | loss 2.1341 | ...

Rank 0 logs information; every rank logs warnings, with its rank as a prefix.
"""

from __future__ import annotations

import logging
import sys
from pathlib import Path

LOGGER = "megalong"
_FORMAT = "%(asctime)s %(message)s"
_DATE = "%Y-%m-%d %H:%M:%S"


class _RankPrefix(logging.Filter):
    def __init__(self, rank: int) -> None:
        super().__init__()
        self.rank = rank

    def filter(self, record: logging.LogRecord) -> bool:
        if record.levelno >= logging.WARNING and not getattr(record, "prefixed", False):
            where = f"[rank {self.rank}] " if self.rank else ""
            record.msg = f"{record.levelname.lower()}: {where}{record.msg}"
            record.prefixed = True
        return True


def setup_logging(rank: int = 0, run_dir: Path | None = None) -> logging.Logger:
    """Send the `megalong` logger to stderr and, on rank 0, to `run_dir/log.txt` (restarts append to it)."""
    logger = logging.getLogger(LOGGER)
    close_logging()
    logger.propagate = False
    logger.setLevel(logging.INFO if rank == 0 else logging.WARNING)
    handlers: list[logging.Handler] = [logging.StreamHandler(sys.stderr)]
    if run_dir is not None and rank == 0:
        run_dir.mkdir(parents=True, exist_ok=True)
        handlers.append(logging.FileHandler(run_dir / "log.txt"))
    for handler in handlers:
        handler.setFormatter(logging.Formatter(_FORMAT, _DATE))
        handler.addFilter(_RankPrefix(rank))
        logger.addHandler(handler)
    return logger


def close_logging() -> None:
    """Close and remove the logger's handlers."""
    logger = logging.getLogger(LOGGER)
    for handler in list(logger.handlers):
        logger.removeHandler(handler)
        handler.close()
