"""The files of a corpus, and how they are split into parts that are tokenized independently.

    .jsonl .json   one JSON object a line, the document under a key (by default "text")
    .txt           the whole file is one document
    .parquet       one row a document, the text in the column of that name
    .gz .zst       compressed JSON lines or text

The size of a part does not depend on the number of workers, so a corpus is always split the same way:

    a.jsonl 20 MB | b.txt 1 MB | c.jsonl.gz 9 MB, parts of 8 MB:
    [a 0-8M] [a 8-16M] [a 16-20M, b, c]

Plain JSON lines are split anywhere (a line belongs to the part in which it starts), parquet between row groups. A
compressed file is one piece, because it can only be read from its start: a corpus of a few huge compressed files keeps
few cores busy.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from megalong.data.corpus.listing import Listing, Log
from megalong.errors import UserError

LINES = (".jsonl", ".json")
TEXT = (".txt",)
TABLE = (".parquet",)
PACKED = (".gz", ".zst")
IN_FOLDERS = (
    tuple(  # not .json: data folders contain settings files of that name
        f"{kind}{packing}" for kind in (".jsonl", ".txt") for packing in ("", *PACKED)
    )
    + TABLE
)

SMALLEST_PART, LARGEST_PART = 8 << 20, 64 << 20
PARTS_WANTED = 256  # enough to balance the workers and to lose little in a kill


@dataclass(frozen=True)
class Source:
    """One file of the corpus: `kind` is LINES, TEXT or TABLE, `packing` one of PACKED or empty."""

    path: str
    kind: tuple[str, ...]
    packing: str
    size: int
    mtime_ns: int


@dataclass(frozen=True)
class Piece:
    """A part's share of a file: bytes [start, end) of plain JSON lines, row groups of a table, else the whole file."""

    source: Source
    start: int
    end: int


@dataclass(frozen=True)
class Part:
    """The unit of work of a worker; `size` is in bytes on disk."""

    number: int
    pieces: tuple[Piece, ...]
    size: int


def find_files(inputs: Sequence[str], log: Log | None = None) -> list[Source]:
    """Files named by `inputs`, in order. Files in folders and subfolders, and matches of wildcards, are sorted.

    Args:
        log: called with each line about what was left out (see listing.py).

    Raises:
        UserError: a file does not exist, cannot be opened or is of an unknown kind, or a folder contains no corpus.
    """
    listing = Listing(IN_FOLDERS)
    for name in inputs:
        listing.add(name)
    files = [_source(file) for file in listing.files]
    if not files:
        raise UserError("--input: no file given; name at least one .jsonl, .txt or .parquet file, or a folder of them")
    if log is not None:
        listing.log_left_out(log)
    return files


def part_bytes(files: Sequence[Source]) -> int:
    """Bytes of a part. Depends only on the size of the corpus."""
    return min(max(sum(file.size for file in files) // PARTS_WANTED, SMALLEST_PART), LARGEST_PART)


def cut_into_parts(files: Sequence[Source], size: int) -> list[Part]:
    """Split the corpus, in order, into parts of about `size` bytes.

    Raises:
        UserError: a parquet file is damaged.
    """
    parts: list[Part] = []
    pieces: list[Piece] = []
    room = size
    for file in files:
        for piece, taken in _pieces(file, size):
            while file.kind == LINES and not file.packing and taken > room:
                pieces.append(Piece(file, piece.start, piece.start + room))
                parts.append(Part(len(parts), tuple(pieces), size))
                piece, taken = Piece(file, piece.start + room, piece.end), taken - room
                pieces, room = [], size
            pieces.append(piece)
            room -= taken
            if room <= 0:
                parts.append(Part(len(parts), tuple(pieces), size - room))
                pieces, room = [], size
    if pieces:
        parts.append(Part(len(parts), tuple(pieces), size - room))
    return parts


def _pieces(file: Source, size: int) -> Iterator[tuple[Piece, int]]:
    """Row groups of a table, else the whole file, each with its bytes."""
    if file.kind == TABLE:
        from megalong.data.corpus.parquet import row_group_sizes

        for group, taken in enumerate(row_group_sizes(file.path)):
            yield Piece(file, group, group + 1), taken
    else:
        yield Piece(file, 0, file.size), file.size


def _source(file: Path) -> Source:
    name = file.name.lower()
    packing = next((ending for ending in PACKED if name.endswith(ending)), "")
    suffix = Path(name.removesuffix(packing)).suffix
    kind = next((kind for kind in (LINES, TEXT, TABLE) if suffix in kind), None)
    if kind is None or (kind == TABLE and packing):
        raise UserError(
            f"--input: {file} is of an unknown kind; give .jsonl, .json or .txt, plain or with .gz or .zst, or .parquet"
        )
    try:
        file.open("rb").close()
        stat = file.stat()
    except OSError as error:
        raise UserError(f"--input: {file} cannot be opened ({error.strerror}); check its permissions") from None
    return Source(str(file), kind, packing, stat.st_size, stat.st_mtime_ns)
