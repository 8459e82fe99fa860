"""Records of a source's files: one JSON object per line, or one row of a table."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from megalong.data.corpus import parquet
from megalong.data.corpus.records import BadRecordError, parsed_unambiguous, raw_lines
from megalong.data.corpus.sources import LINES, TABLE, Piece, Source
from megalong.errors import UserError


@dataclass(frozen=True)
class Unreadable:
    """A line or row that cannot be read, and why."""

    why: str


def records(source: Source) -> Iterator[tuple[str, Any, float]]:
    """(place for messages, record, share of the file read). A record that cannot be read is an `Unreadable`.

    For a compressed file the share is unknown, and 0.

    Raises:
        UserError: a file is broken or of another kind.
    """
    if source.kind == TABLE:
        names, texts = parquet.columns(source.path), set(parquet.text_columns(source.path))
        groups = len(parquet.row_group_sizes(source.path))
        total = parquet.number_of_rows(source.path)
        for row, values in parquet.rows(source.path, 0, groups, names):
            record = {name: _text(value) for name, value in zip(names, values, strict=True)}
            yield f"{source.path}, row {row}", _readable(record, texts), row / total
    elif source.kind == LINES:
        read, size = 0, 0 if source.packing else source.size
        for number, line in raw_lines(Piece(source, 0, source.size)):
            read += len(line) + 1
            yield f"{source.path}, line {number}", _object(line), read / size if size else 0.0
    else:
        raise UserError(f"sft.sources: {source.path} is plain text; write conversations as .jsonl or .parquet")


def _text(value: Any) -> Any:
    try:
        return value.decode("utf-8") if isinstance(value, bytes) else value
    except UnicodeDecodeError as error:
        return parquet.Unreadable(f"not UTF-8 ({error.reason} at byte {error.start})")


def _readable(record: dict[str, Any], texts: set[str]) -> Any:
    """The record, or `Unreadable` if a text column is not UTF-8. Columns without text, such as images, need not be."""
    for name, value in record.items():
        if isinstance(value, parquet.Unreadable) and name in texts:
            return Unreadable(f"column {name!r}: {value.why}")
    return record


def _object(line: bytes) -> Any:
    try:
        return parsed_unambiguous(line)
    except BadRecordError as error:
        return Unreadable(str(error))
