"""Documents as they lie on disk: JSON lines and plain text, gzipped or not.

    .jsonl .json   one JSON object a line, the document under a key ("text" unless told otherwise)
    .txt           the whole file is one document
    .gz            either of them, gzipped

Reading and understanding are apart: `read_chunks` cuts files into records of raw bytes, which is cheap and is done by
one process, `texts_of` decodes a record, which is dear and is done by the workers. Every record carries its file and
line, so that a mistake on line 31,415,926 is told with that number. Text is taken as it stands: no newline is
translated, nothing is stripped but a byte order mark at the start of a file.
"""

import gzip
import io
import json
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from glob import glob, has_magic
from pathlib import Path
from typing import IO

from megalong.errors import UserError

LINES = (".jsonl", ".json")
TEXT = (".txt",)
IN_FOLDERS = (".jsonl", ".jsonl.gz", ".txt", ".txt.gz")  # not .json: folders of data hold settings of that name
BYTE_ORDER_MARK = b"\xef\xbb\xbf"


@dataclass(frozen=True)
class Record:
    """One document, not yet decoded: the file, its line there (0: the whole file), the bytes."""

    file: str
    line: int
    data: bytes

    @property
    def where(self) -> str:
        """The record's place, as an error message names it."""
        return f"{self.file}, line {self.line}" if self.line else self.file


@dataclass
class Chunk:
    """Records that one worker takes at once, and how many bytes of all inputs were read by their end."""

    records: list[Record] = field(default_factory=list)
    size: int = 0
    position: int = 0


def find_files(inputs: Sequence[str]) -> list[Path]:
    """Files named by `inputs`, in order; folders (all they hold, in depth) and wildcards in sorted order.

    Raises:
        UserError: something is not there, is of an unknown kind, or holds no corpus.
    """
    files = [file for name in inputs for file in _files_of(name)]
    if not files:
        raise UserError("--input: no file given; name at least one .jsonl or .txt file, or a folder of them")
    for file in files:
        _suffix(file)
    return files


def read_chunks(files: Sequence[Path], chunk_bytes: int) -> Iterator[Chunk]:
    """The records of `files` in order, about `chunk_bytes` of them at a time (at least one record).

    Raises:
        UserError: a file cannot be opened, or its gzip stream is broken.
    """
    chunk, before = Chunk(), 0
    for file in files:
        with _opened(file) as raw:
            for record in _records(file, raw):
                chunk.records.append(record)
                chunk.size += len(record.data)
                chunk.position = before + raw.tell()
                if chunk.size >= chunk_bytes:
                    yield chunk
                    chunk = Chunk()
        before += file.stat().st_size
    if chunk.records:
        yield chunk


def texts_of(record: Record, keys: Sequence[str]) -> list[str]:
    """The texts of a record, one for each of `keys`.

    Raises:
        UserError: not UTF-8, not a JSON object, a key that is absent or no string, half a surrogate pair.
    """
    try:
        text = record.data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise UserError(f"{record.where}: not UTF-8 ({error.reason} at byte {error.start}); convert the file") from None
    texts = [text] if record.line == 0 else _fields(text, keys, record.where)
    for text in texts:
        _refuse_half_surrogates(text, record.where)
    return texts


def _files_of(name: str) -> list[Path]:
    path = Path(name)
    if path.is_dir():
        found = sorted(file for file in path.rglob("*") if file.name.lower().endswith(IN_FOLDERS) and file.is_file())
        if not found:
            raise UserError(f"--input: the folder {name} holds none of {', '.join(IN_FOLDERS)}; name files instead")
        return found
    if not path.exists() and has_magic(name):
        found = sorted(Path(match) for match in glob(name, recursive=True))
        if not found:
            raise UserError(f"--input: nothing matches {name!r}; check the wildcard")
        return found
    if not path.is_file():
        raise UserError(f"--input: {name} does not exist or is no file; check the path")
    return [path]


def _suffix(file: Path) -> str:
    suffix = Path(file.name.lower().removesuffix(".gz")).suffix
    if suffix not in LINES + TEXT:
        raise UserError(f"--input: {file} is of an unknown kind; give .jsonl, .json or .txt, plain or with .gz")
    return suffix


def _opened(file: Path) -> IO[bytes]:
    try:
        return file.open("rb")
    except OSError as error:
        raise UserError(f"--input: {file} cannot be opened ({error.strerror}); check its permissions") from None


def _records(file: Path, raw: IO[bytes]) -> Iterator[Record]:
    unpacked = io.BufferedReader(gzip.GzipFile(fileobj=raw)) if file.name.lower().endswith(".gz") else raw
    line = 0
    try:
        if _suffix(file) in TEXT:
            yield Record(str(file), 0, unpacked.read().removeprefix(BYTE_ORDER_MARK))
            return
        for line, data in enumerate(unpacked, 1):
            if not data.isspace():
                yield Record(str(file), line, data.removeprefix(BYTE_ORDER_MARK) if line == 1 else data)
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise UserError(f"{file}, line {line + 1}: broken gzip stream ({error}); fetch the file again") from None


def _fields(line: str, keys: Sequence[str], where: str) -> list[str]:
    try:
        content = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{where}: not valid JSON ({error}); give one JSON object a line") from None
    if not isinstance(content, dict):
        raise UserError(
            f"{where}: a JSON {type(content).__name__}, not an object; write {{{keys[0]!r}: …}} on the line"
        )
    for key in keys:
        if key not in content:
            raise UserError(f"{where}: no key {key!r} (there are: {', '.join(content) or 'none'}); set --json-keys")
        if not isinstance(content[key], str):
            kind = type(content[key]).__name__
            raise UserError(f"{where}: the value of {key!r} is of type {kind}; it must be a string")
    return [content[key] for key in keys]


def _refuse_half_surrogates(text: str, where: str) -> None:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise UserError(
            f"{where}: half a surrogate pair, {text[error.start]!a}, is no text; write the file again from its source"
        ) from None
