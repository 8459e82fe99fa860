"""`RUN/REQUEUE`: a signal stopped the run after a save, and it must be started again.

    {"step": 1200, "signal": "SIGUSR1", "time": "2026-01-31T12:00:00+00:00"}

Batch scripts test for it. The next start removes it first, so that a failing start is not repeated forever.
"""

from __future__ import annotations

import contextlib
import json
from pathlib import Path

from megalong.runtime.amounts import utc_now
from megalong.runtime.folders import file_aside

FILE = "REQUEUE"


def mark(run: Path, step: int, signal: str) -> None:
    """Write the marker of a run whose last saved step is `step`."""
    values = {"step": step, "signal": signal, "time": utc_now("seconds")}
    with file_aside(run / FILE, durable=True) as aside:
        aside.write_text(json.dumps(values) + "\n")


def clear(run: Path) -> None:
    """Remove the marker, if there is one."""
    with contextlib.suppress(NotADirectoryError):  # reported by the check of the run folder
        (run / FILE).unlink(missing_ok=True)
