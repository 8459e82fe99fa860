"""Where a corpus lies: which files, of which kind, and how they are cut into parts that are tokenized on their own.

    .jsonl .json   one JSON object a line, the document under a key ("text" unless told otherwise)
    .txt           the whole file is one document
    .parquet       one row a document, the text in the column of that name
    .gz .zst       JSON lines or text, packed

A part is about as many bytes for every number of workers, so the same corpus is always cut the same way:

    a.jsonl 20 MB | b.txt 1 MB | c.jsonl.gz 9 MB, parts of 8 MB:
    [a 0-8M] [a 8-16M] [a 16-20M, b, c]

Plain JSON lines are cut anywhere (a line belongs to the part it starts in), parquet between row groups, and a packed
file is one piece, for it can be read from its start only: a corpus packed into a few huge files keeps few cores busy.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from megalong.data.corpus.listing import Listing, Say
from megalong.errors import UserError

LINES = (".jsonl", ".json")
TEXT = (".txt",)
TABLE = (".parquet",)
PACKED = (".gz", ".zst")
IN_FOLDERS = (
    tuple(  # not .json: folders of data hold settings of that name
        f"{kind}{packing}" for kind in (".jsonl", ".txt") for packing in ("", *PACKED)
    )
    + TABLE
)

SMALLEST_PART, LARGEST_PART = 8 << 20, 64 << 20
PARTS_WANTED = 256  # enough to share out evenly and to lose little in a kill; more would only be more files


@dataclass(frozen=True)
class Source:
    """One file of the corpus: `kind` one of LINES, TEXT, TABLE, `packing` one of PACKED or nothing."""

    path: str
    kind: tuple[str, ...]
    packing: str
    size: int
    mtime_ns: int


@dataclass(frozen=True)
class Piece:
    """What a part takes of a file: bytes [start, end) of plain JSON lines, row groups of a table, else all of it."""

    source: Source
    start: int
    end: int


@dataclass(frozen=True)
class Part:
    """What one worker takes at once; `size` is in bytes on disk."""

    number: int
    pieces: tuple[Piece, ...]
    size: int


def find_files(inputs: Sequence[str], say: Say | None = None) -> list[Source]:
    """Files named by `inputs`, in order; folders (all they hold, in depth) and wildcards in sorted order.

    Args:
        say: told of what was left out, a line at a time (see listing.py).

    Raises:
        UserError: something is not there, cannot be opened, is of an unknown kind, or holds no corpus.
    """
    listing = Listing(IN_FOLDERS)
    for name in inputs:
        listing.add(name)
    files = [_source(file) for file in listing.files]
    if not files:
        raise UserError("--input: no file given; name at least one .jsonl, .txt or .parquet file, or a folder of them")
    if say is not None:
        listing.tell(say)
    return files


def part_bytes(files: Sequence[Source]) -> int:
    """Bytes of a part, by the size of the corpus alone."""
    return min(max(sum(file.size for file in files) // PARTS_WANTED, SMALLEST_PART), LARGEST_PART)


def cut_into_parts(files: Sequence[Source], size: int) -> list[Part]:
    """The corpus in order, in parts of about `size` bytes.

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
    """Pieces of a file that may stand alone, each with its bytes."""
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
