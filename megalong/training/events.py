"""The events of a run in `RUN/events.jsonl`, one JSON object per line.

    {"time": "2026-01-31T12:00:00+00:00", "step": 50, "kind": "save", "seconds": 1.25}

Rank 0 appends to it over all lives of a run. Recording must never end a run: a failed write is only a warning in the
log.
"""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

from megalong.runtime import json_lines
from megalong.runtime.amounts import utc_now
from megalong.runtime.distributed import is_main_rank

log = logging.getLogger("megalong")

FILE = "events.jsonl"


def record(run: Path | str, step: int, kind: str, **details: Any) -> None:
    """Append one event; does nothing on ranks other than 0.

    Args:
        step: the last complete step (0 before the first).
        kind: start, resume, save, save_failed, skip, rollback, stop, signal, finish, …
        details: anything JSON can represent; infinite numbers and NaN are written as text.
    """
    if not is_main_rank():
        return
    file, event = Path(run) / FILE, {"time": utc_now(), "step": step, "kind": kind, **details}
    try:
        json_lines.append(file, event)
    except OSError as error:
        log.warning("%s: %s; event not written: %s", file, error.strerror, event)


def read(run: Path | str) -> list[dict[str, Any]]:
    """The events of a run, oldest first; none if there is no file."""
    return json_lines.read(Path(run) / FILE)
