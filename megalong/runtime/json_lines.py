"""A file with one JSON object per line, to which all lives of a run append.

A process that is killed while it writes leaves at most one torn line at the end, which readers skip. Strict JSON has no
NaN and no infinity, so these are written as text.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO


def append(file: Path, values: dict[str, Any]) -> None:
    """Append `values` as one line; creates folder and file if needed.

    Raises:
        OSError: the line cannot be written.
    """
    line = json.dumps(_plain(values)) + "\n"
    file.parent.mkdir(parents=True, exist_ok=True)
    with file.open("ab+") as stream:
        if _torn(stream):
            line = "\n" + line
        stream.write(line.encode())


def read(file: Path) -> list[dict[str, Any]]:
    """The file's objects, first to last; empty if there is no file."""
    try:
        lines = file.read_bytes().splitlines()
    except FileNotFoundError:
        return []
    return [values for line in lines if (values := _object(line)) is not None]


def cut(file: Path, keep: Callable[[dict[str, Any]], bool]) -> None:
    """Truncate the file before the first object that `keep` rejects.

    Raises:
        OSError: the file cannot be read or changed.
    """
    try:
        stream = file.open("rb+")
    except FileNotFoundError:
        return
    with stream:
        end = 0
        for line in stream:
            values = _object(line)
            if values is not None and not keep(values):
                stream.truncate(end)
                return
            end += len(line)


def _object(line: bytes) -> dict[str, Any] | None:
    try:
        values = json.loads(line)
    except ValueError:  # torn by a kill
        return None
    return values if isinstance(values, dict) else None


def _torn(stream: BinaryIO) -> bool:
    """Whether the file ends inside a line."""
    if stream.seek(0, os.SEEK_END) == 0:
        return False
    stream.seek(-1, os.SEEK_END)
    return stream.read(1) != b"\n"


def _plain(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if isinstance(value, dict):
        return {str(key): _plain(one) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(one) for one in value]
    return value
