"""Reads documents from a part of the corpus and reports every bad record with its file and line.

A record is one line, row or text file: the text of each key. Text is kept as it is: newlines are not translated, and
only a byte order mark at the start of a file is stripped. Bad records (not UTF-8, not JSON, a key that is missing,
repeated or not a string, a lone surrogate) end the run, or are set aside with `--on-error skip`.

Lines are parsed by orjson, which is five times as fast as Python's `json`. Lines that orjson refuses are parsed again
by `json`: some are valid (NaN, integers beyond 64 bits), and for the others it says what is wrong. Conversations and
benchmarks are read by the same functions, so the same lines are valid for all of them.

Lines are counted from the start of a piece. `lines_before` adds the lines before it. That costs a pass over the file,
so it is called only for messages.
"""

import json
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import lru_cache, partial
from pathlib import Path
from typing import IO, Any, NamedTuple

import orjson

from megalong.data.corpus import parquet
from megalong.data.corpus.keys import printable
from megalong.data.corpus.sources import LINES, TABLE, Part, Piece
from megalong.data.corpus.unpack import unpacked
from megalong.errors import UserError

BLOCK = 1 << 20  # bytes read at a time
_KEY_ENDS = (b'":', b'" :')  # the end of a key in a line
BYTE_ORDER_MARK = b"\xef\xbb\xbf"


class Record(NamedTuple):
    """One record: the texts of its keys, its piece, and its line in the piece (from 1; 0: the whole file)."""

    texts: list[str]
    piece: Piece
    line: int


class Bad(NamedTuple):
    """A record that cannot be used: where it is, why, and its content."""

    piece: Piece
    line: int
    why: str
    data: bytes


class BadRecordError(Exception):
    """Why a record cannot be used, and what to do about it."""


OnBad = Callable[[Bad], None]
OnKeys = Callable[[Piece, Iterable[str]], None]


def refuse(bad: Bad) -> None:
    """Handle a bad record under `--on-error fail`.

    Raises:
        UserError: always, with file and line.
    """
    raise UserError(f"{place(bad.piece, bad.line)}: {bad.why}") from None


def place(piece: Piece, line: int) -> str:
    """A record's place for messages: file and line, or only the file if it is one document."""
    word = "row" if piece.source.kind == TABLE else "line"
    return f"{piece.source.path}, {word} {line_number(piece, line)}" if line else piece.source.path


def line_number(piece: Piece, line: int) -> int:
    """The line number in the file of line `line` of a piece."""
    whole = piece.source.kind != LINES or piece.start == 0
    return line if whole else line + lines_before(piece.source.path, piece.start)


def read_records(
    part: Part, keys: Sequence[str], on_bad: OnBad = refuse, on_keys: OnKeys | None = None
) -> Iterator[Record]:
    """The records of `part` in order; those that cannot be used are passed to `on_bad`.

    Args:
        on_keys: called with all keys of a record that has more than `keys`.

    Raises:
        UserError: a file changed since it was listed, or is broken.
    """
    for piece in part.pieces:
        _refuse_changed(piece)
        more = None if on_keys is None else partial(on_keys, piece)
        columns = parquet.columns(piece.source.path) if more is not None and piece.source.kind == TABLE else []
        for line, data in _raw_records(piece, keys):
            try:
                if piece.source.kind == LINES:
                    yield Record(texts_of(data, keys, more), piece, line)
                    continue
                texts = _plain_texts(data)
                if more is not None and len(columns) > len(keys):
                    more(columns)
                yield Record(texts, piece, line)
            except BadRecordError as error:
                on_bad(Bad(piece, line, str(error), data if isinstance(data, bytes) else repr(data).encode()))


def texts_of(line: bytes, keys: Sequence[str], more: Callable[[Iterable[str]], None] | None = None) -> list[str]:
    """The texts of one JSON line, one for each of `keys`.

    Args:
        more: called with all keys of a record that has more than `keys`.

    Raises:
        BadRecordError: the record cannot be used.
    """
    try:
        content = orjson.loads(line)
        texts = [content[key] for key in keys]
    except (ValueError, KeyError, TypeError, IndexError):
        texts, content = _texts_by_json(line, keys)
    else:
        if not all(type(text) is str for text in texts) or any(_may_repeat(line, key) for key in keys):
            texts, content = _texts_by_json(line, keys)
    if more is not None and len(content) > len(keys):
        more(content)
    return texts


def parsed(line: bytes) -> Any:
    """The value of a line of JSON. NaN, infinity and integers of any size are accepted, as by Python's `json`.

    Raises:
        BadRecordError: the line is not JSON or not UTF-8.
    """
    try:
        return orjson.loads(line)
    except ValueError:
        return _by_json(line)


def parsed_unambiguous(line: bytes) -> Any:
    """Like `parsed`, but refuses a line in which an object has a key twice: parsers silently drop one of them.

    Raises:
        BadRecordError: the line cannot be parsed, or an object has a key twice.
    """
    content = parsed(line)
    spelled = sum(line.count(end) - line.count(b"\\" + end) for end in _KEY_ENDS)
    if spelled > _number_of_keys(content):
        _by_json(line, _refuse_repeated)
    return content


@lru_cache(maxsize=64)
def lines_before(path: str, position: int) -> int:
    """Number of lines of an uncompressed file that start before byte `position`."""
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


def raw_lines(piece: Piece) -> Iterator[tuple[int, bytes]]:
    """(line number from 1, bytes) of each non-blank line of a piece, without a byte order mark."""
    line = 0
    with unpacked(piece.source.path, piece.source.packing) as stream:
        for block in _blocks(stream, piece):
            for data in block.split(b"\n"):
                line += 1
                if data and not data.isspace():
                    yield line, data
            line -= 1  # the empty string after a block's last newline is not a line


def _raw_records(piece: Piece, keys: Sequence[str]) -> Iterator[tuple[int, Any]]:
    """(line, content) of each non-blank record. The content is bytes, or the values of a table's row."""
    source = piece.source
    if source.kind == TABLE:
        yield from parquet.text_rows(source.path, piece.start, piece.end, keys)
    elif source.kind == LINES:
        yield from raw_lines(piece)
    else:
        with unpacked(source.path, source.packing) as stream:
            yield 0, [stream.read().removeprefix(BYTE_ORDER_MARK)]


def _blocks(stream: IO[bytes], piece: Piece) -> Iterator[bytes]:
    """The lines that start inside the piece, in blocks of whole lines of about a megabyte."""
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


def _by_json(line: bytes, of_pairs: Callable[[list[tuple[str, Any]]], Any] | None = None) -> Any:
    try:
        return json.loads(_decoded(line), object_pairs_hook=of_pairs)
    except (ValueError, RecursionError) as error:
        raise BadRecordError(f"not valid JSON ({error}); give one JSON object a line") from None


def _texts_by_json(line: bytes, keys: Sequence[str]) -> tuple[list[str], dict[str, Any]]:
    """(texts, whole record) of a line by Python's `json`, which finds out what is wrong with a bad one."""
    repeated: set[str] = set()  # keys of the outermost object, which the hook sees last

    def of_pairs(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        repeated.clear()
        repeated.update(_repeated(pairs))
        return dict(pairs)

    content = _by_json(line, of_pairs)
    if not isinstance(content, dict):
        raise BadRecordError(f"a JSON {type(content).__name__}, not an object; write {{{keys[0]!r}: …}} on the line")
    for key in keys:
        if key not in content:
            there = ", ".join(map(printable, content))
            raise BadRecordError(f"no key {key!r} (there are: {there or 'none'}); set --json-keys")
        if key in repeated:
            raise BadRecordError(f"key {key!r} occurs twice; keep one")
        if not isinstance(content[key], str):
            _refused_type(f"value of {key!r}", content[key])
        if (why := half_surrogate(content[key])) is not None:
            raise BadRecordError(why)
    return [content[key] for key in keys], content


def _may_repeat(line: bytes, key: str) -> bool:
    """Whether an object in a line may have `key` twice. Inside a text every quote has a backslash before it."""
    quoted = _quoted(key)
    if line.find(quoted) == line.rfind(quoted):  # nearly always true, and fast
        return False
    return sum(line.count(quoted[:-1] + end) for end in _KEY_ENDS) > 1


@lru_cache(maxsize=64)
def _quoted(key: str) -> bytes:
    return orjson.dumps(key)


def _number_of_keys(content: Any) -> int:
    """Number of keys in all objects in `content`."""
    count, left = 0, [content]
    while left:
        value = left.pop()
        if isinstance(value, dict):
            count += len(value)
            left += value.values()
        elif isinstance(value, list):
            left += value
    return count


def _repeated(pairs: list[tuple[str, Any]]) -> set[str]:
    return {key for key, count in Counter(key for key, _ in pairs).items() if count > 1} if pairs else set()


def _refuse_repeated(pairs: list[tuple[str, Any]]) -> None:
    for key in _repeated(pairs):
        raise BadRecordError(f"key {key!r} occurs twice in one object; keep one")


def half_surrogate(text: str) -> str | None:
    """Why `text` is invalid if it contains a lone surrogate, which JSON can spell; else None."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        return f"half a surrogate pair, {text[error.start]!a}, is not text; write the file again from its source"
    return None
