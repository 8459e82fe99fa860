"""`RUN/REQUEUE`: a signal stopped the run, it has saved, and it must be started again.

    {"step": 1200, "signal": "SIGUSR1", "time": "2026-01-31T12:00:00+00:00"}

Batch scripts test for it; the next start takes it away first, so that a start which fails is not repeated for ever.
"""

from __future__ import annotations

import contextlib
import json
from pathlib import Path

from megalong.runtime.amounts import utc_now
from megalong.runtime.folders import file_aside

FILE = "REQUEUE"


def mark(run: Path, step: int, signal: str) -> None:
    """Leave the marker of a run whose last saved step is `step`."""
    told = {"step": step, "signal": signal, "time": utc_now("seconds")}
    with file_aside(run / FILE, durable=True) as aside:
        aside.write_text(json.dumps(told) + "\n")


def clear(run: Path) -> None:
    """Take the marker away, if there is one."""
    with contextlib.suppress(NotADirectoryError):  # who checks the run folder says so
        (run / FILE).unlink(missing_ok=True)
