"""Documents out of a part of the corpus, and every bad one told with its file and line.

A record is what one line, row or text file holds: the text under each key. Text is taken as it stands: no newline is
translated, nothing is stripped but a byte order mark at the start of a file. Bad records (not UTF-8, not JSON, a key
that is missing or no string, half a surrogate pair) end the run, or are set aside with `--on-error skip`.

A line is read by orjson, five times as fast as Python's `json`. What orjson refuses, `json` judges: some of it is good
(NaN, whole numbers past 64 bits), and for the rest it says what is wrong.

Lines are counted from the start of a part; `lines_before` adds what lies before it, which costs a pass over the file
and is asked for only where there is something to tell.
"""

import json
from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache
from pathlib import Path
from typing import IO, Any, NamedTuple

import orjson

from megalong.data import parquet
from megalong.data.sources import LINES, TABLE, Part, Piece
from megalong.data.unpack import unpacked
from megalong.errors import UserError

BLOCK = 1 << 20  # bytes of a file looked at once
BYTE_ORDER_MARK = b"\xef\xbb\xbf"


class Record(NamedTuple):
    """One record: the texts of its keys, the piece it came from, its line there (from 1; 0: the whole file)."""

    texts: list[str]
    piece: Piece
    line: int


class Bad(NamedTuple):
    """A record that cannot be used: where it stands, why, and what it holds."""

    piece: Piece
    line: int
    why: str
    data: bytes


class BadRecordError(Exception):
    """Why a record cannot be used, and what to do about it."""


OnBad = Callable[[Bad], None]


def refuse(bad: Bad) -> None:
    """What `--on-error fail` does with a bad record.

    Raises:
        UserError: always, with file and line.
    """
    raise UserError(f"{place(bad.piece, bad.line)}: {bad.why}") from None


def place(piece: Piece, line: int) -> str:
    """A record's place as a message names it: file and line, the file alone where it is one document."""
    word = "row" if piece.source.kind == TABLE else "line"
    return f"{piece.source.path}, {word} {line_number(piece, line)}" if line else piece.source.path


def line_number(piece: Piece, line: int) -> int:
    """The line in the file of line `line` of a piece."""
    whole = piece.source.kind != LINES or piece.start == 0
    return line if whole else line + lines_before(piece.source.path, piece.start)


def read_records(part: Part, keys: Sequence[str], on_bad: OnBad = refuse) -> Iterator[Record]:
    """The records of `part` in order; those that cannot be used go to `on_bad`.

    Raises:
        UserError: a file changed since it was listed, or is broken.
    """
    for piece in part.pieces:
        _refuse_changed(piece)
        for line, data in _raw_records(piece, keys):
            try:
                yield Record(texts_of(data, keys) if piece.source.kind == LINES else _plain_texts(data), piece, line)
            except BadRecordError as error:
                on_bad(Bad(piece, line, str(error), data if isinstance(data, bytes) else repr(data).encode()))


def texts_of(line: bytes, keys: Sequence[str]) -> list[str]:
    """The texts of one JSON line, one for each of `keys`.

    Raises:
        BadRecordError: it cannot be used.
    """
    try:
        content = orjson.loads(line)
        texts = [content[key] for key in keys]
    except (ValueError, KeyError, TypeError, IndexError):
        return _judged(line, keys)
    return texts if all(type(text) is str for text in texts) else _judged(line, keys)


@lru_cache(maxsize=64)
def lines_before(path: str, position: int) -> int:
    """Lines of a plain file that start before byte `position`."""
    lines, left, last = 0, position, b"\n"
    with open(path, "rb") as file:
        while left and (block := file.read(min(BLOCK, left))):
            lines, left, last = lines + block.count(b"\n"), left - len(block), block[-1:]
    return lines + (last != b"\n")


def _refuse_changed(piece: Piece) -> None:
    try:
        stat = Path(piece.source.path).stat()
    except OSError as error:
        raise UserError(f"--input: {piece.source.path} is gone ({error.strerror}); put it back") from None
    if (stat.st_size, stat.st_mtime_ns) != (piece.source.size, piece.source.mtime_ns):
        raise UserError(f"--input: {piece.source.path} changed while it was being read; run again when it is whole")


def _raw_records(piece: Piece, keys: Sequence[str]) -> Iterator[tuple[int, Any]]:
    """(line, content) of every record that is not blank: bytes, or the values of a table's row."""
    source = piece.source
    if source.kind == TABLE:
        yield from parquet.text_rows(source.path, piece.start, piece.end, keys)
        return
    with unpacked(source.path, source.packing) as stream:
        if source.kind != LINES:
            yield 0, [stream.read().removeprefix(BYTE_ORDER_MARK)]
            return
        line = 0
        for block in _blocks(stream, piece):
            for data in block.split(b"\n"):
                line += 1
                if data and not data.isspace():
                    yield line, data
            line -= 1  # what follows a block's last newline is no line


def _blocks(stream: IO[bytes], piece: Piece) -> Iterator[bytes]:
    """Whole lines, a few megabytes at a time: those that start inside the piece."""
    if piece.start:
        stream.seek(piece.start - 1)
        stream.readline()
    packed = bool(piece.source.packing)
    position = 0 if packed else stream.tell()
    first = piece.start == 0
    while packed or position < piece.end:
        block = stream.read(BLOCK if packed else min(BLOCK, piece.end - position))
        if not block:
            return
        if not block.endswith(b"\n"):
            block += stream.readline()
        position += len(block)
        if first:
            block, first = block.removeprefix(BYTE_ORDER_MARK), False
        yield block if block.endswith(b"\n") else block + b"\n"


def _plain_texts(values: Sequence[Any]) -> list[str]:
    return [_decoded(value) if isinstance(value, bytes) else _refused_type("value", value) for value in values]


def _refused_type(what: str, value: Any) -> str:
    raise BadRecordError(f"the {what} is of type {type(value).__name__}; it must be a string")


def _decoded(data: bytes) -> str:
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise BadRecordError(f"not UTF-8 ({error.reason} at byte {error.start}); convert the file") from None


def _judged(line: bytes, keys: Sequence[str]) -> list[str]:
    """The texts of a line that orjson or its keys would not give."""
    try:
        content = json.loads(_decoded(line))
    except (ValueError, RecursionError) as error:
        raise BadRecordError(f"not valid JSON ({error}); give one JSON object a line") from None
    if not isinstance(content, dict):
        raise BadRecordError(f"a JSON {type(content).__name__}, not an object; write {{{keys[0]!r}: …}} on the line")
    for key in keys:
        if key not in content:
            raise BadRecordError(f"no key {key!r} (there are: {', '.join(content) or 'none'}); set --json-keys")
        if not isinstance(content[key], str):
            _refused_type(f"value of {key!r}", content[key])
        if (why := half_surrogate(content[key])) is not None:
            raise BadRecordError(why)
    return [content[key] for key in keys]


def half_surrogate(text: str) -> str | None:
    """Why `text` is none, if it holds half of a surrogate pair, as JSON can spell it."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        return f"half a surrogate pair, {text[error.start]!a}, is no text; write the file again from its source"
    return None
