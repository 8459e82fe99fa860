"""What happened to a run, one JSON object a line in `RUN/events.jsonl`: for scripts, reports and people at 3 am.

    {"time": "2026-01-31T12:00:00+00:00", "step": 50, "kind": "save", "seconds": 1.25}

Appended to over all lives of a run, by rank 0. A life that was killed while it wrote leaves at most one torn line,
which readers pass over. Telling must never end a run: what the disk does not take is a warning in the log.
"""

from __future__ import annotations

import datetime
import json
import logging
import math
import os
from pathlib import Path
from typing import Any

from megalong.runtime.distributed import is_main_rank

log = logging.getLogger("megalong")

FILE = "events.jsonl"


def record(run: Path | str, step: int, kind: str, **details: Any) -> None:
    """Append one event; does nothing on ranks other than 0.

    Args:
        step: the last step that was complete (0 before the first).
        kind: start, resume, save, save_failed, skip, rollback, stop, signal, finish, …
        details: anything JSON can say; infinite numbers and NaN are written as text.
    """
    if not is_main_rank():
        return
    now = datetime.datetime.now(datetime.UTC).isoformat(timespec="milliseconds")
    line = json.dumps(_plain({"time": now, "step": step, "kind": kind, **details})) + "\n"
    file = Path(run) / FILE
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with file.open("ab+") as stream:
            if _torn(stream):
                line = "\n" + line
            stream.write(line.encode())
    except OSError as error:
        log.warning("%s: %s; not written there: %s", file, error.strerror, line.strip())


def read(run: Path | str) -> list[dict[str, Any]]:
    """The events of a run, oldest first; none where there is no file."""
    try:
        lines = (Path(run) / FILE).read_text(errors="replace").splitlines()
    except FileNotFoundError:
        return []
    events = []
    for line in lines:
        try:
            event = json.loads(line)
        except ValueError:  # torn by a kill
            continue
        if isinstance(event, dict):
            events.append(event)
    return events


def _torn(stream: Any) -> bool:
    """Whether the file ends inside a line."""
    if stream.seek(0, os.SEEK_END) == 0:
        return False
    stream.seek(-1, os.SEEK_END)
    return bool(stream.read(1) != b"\n")


def _plain(value: Any) -> Any:
    """`value` as strict JSON knows it, which has no NaN."""
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if isinstance(value, dict):
        return {str(key): _plain(one) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(one) for one in value]
    return value
