"""Megatron's indexed dataset: a file of tokens, and an index of where each document starts.

    P.bin   the tokens of all documents, concatenated
    P.idx   little-endian: b"MMIDIDX\\0\\0" | version 1 (u64) | token type (u8) | sequences N (u64) | D (u64)
            | int32 lengths[N] | int64 byte pointers[N] | int64 document_indices[D]
    P.json  our sidecar (absent beside Megatron-LM's own datasets): tokenizer, separator, counts

Document d is the sequences document_indices[d] up to document_indices[d + 1]; D is therefore documents + 1. Example:
two documents of 3 and 2 uint16 tokens: lengths [3, 2], pointers [0, 6], document_indices [0, 1, 2], a .bin of 10 bytes.

Both files are memory-mapped, so tokens are read page by page when they are needed. Opening checks the whole index once
(20 bytes per document). A truncated copy is therefore reported at the start, by name and size, and not by a wrong token
three days into a run.
"""

import json
import mmap
import os
import struct
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from megalong.errors import ForeignIdError, UserError
from megalong.runtime.files import refuse_unreadable

MAGIC = b"MMIDIDX\x00\x00"
VERSION = 1
SIDECAR_FORMAT = 1
HEADER = struct.Struct("<9sQBQQ")
TOKEN_TYPES = {1: "uint8", 2: "int8", 3: "int16", 4: "int32", 5: "int64", 6: "float64", 7: "float32", 8: "uint16"}
TYPE_CODES = {name: code for code, name in TOKEN_TYPES.items()}
_LONG = 4096  # tokens of a piece from which the cost of slicing does not matter
CHECKED_AT_ONCE = 1 << 20  # index entries, or bytes of tokens, checked at a time: bounds the memory of the check
# Blocks of CHECKED_AT_ONCE bytes whose tokens are checked before a run. A smaller dataset is checked whole.
CHECKED_BLOCKS = 256

AGAIN = "copy it again, or write it again with `megalong data preprocess`"


def token_type(vocabulary_size: int) -> np.dtype[Any]:
    """Megatron's rule for the type of a token: uint16 below 65,500 ids, int32 from there on."""
    return np.dtype(np.uint16 if vocabulary_size < 65500 else np.int32)


def data_path(prefix: str | Path) -> Path:
    """The file of tokens of the dataset `prefix`."""
    return Path(f"{prefix}.bin")


def index_path(prefix: str | Path) -> Path:
    """The index of the dataset `prefix`; a dataset without it does not exist."""
    return Path(f"{prefix}.idx")


def sidecar_path(prefix: str | Path) -> Path:
    """The description that `megalong data preprocess` adds to the dataset `prefix`."""
    return Path(f"{prefix}.json")


class IndexedDataset:
    """A dataset open for reading.

    Args:
        checked: these files have been checked before (a sample index that was built from them exists).

    Attributes:
        dtype: numpy type of a token in the .bin.
        lengths: int32 [N], tokens of each sequence.
        pointers: int64 [N], byte where each sequence starts in the .bin.
        document_indices: int64 [documents + 1], first sequence of each document, then N.
        sidecar: what P.json says, None without one.
        ids: vocabulary size of the reader. Reading an ID outside 0 to `ids` - 1 is refused. None: IDs are not checked;
            a dataset whose sidecar records the vocabulary size needs no check.

    Raises:
        UserError: a file is missing, truncated, too long, of another format, or contradicts another one.
    """

    def __init__(self, prefix: str | Path, checked: bool = False) -> None:
        self.prefix = str(prefix)
        _refuse_missing(self.prefix)
        self._map_index(index_path(prefix))
        if not checked:
            self._check_index(index_path(prefix))
        self._map_tokens(data_path(prefix))
        self.ids: int | None = None
        self.sidecar = self._read_sidecar(sidecar_path(prefix))

    @property
    def num_tokens(self) -> int:
        """Tokens in the .bin."""
        return len(self._tokens)

    @property
    def num_documents(self) -> int:
        """Documents, empty ones included."""
        return len(self.document_indices) - 1

    @property
    def vocabulary_size(self) -> int | None:
        """Vocabulary size of its tokenizer; None if no sidecar records it: the dataset may then contain any ID."""
        return (self.sidecar or {}).get("vocabulary_size")

    def range_of_ids(self) -> tuple[int, int, int]:
        """(lowest ID, highest ID, tokens checked): of all tokens, or of CHECKED_BLOCKS evenly spaced blocks.

        Reads at most 256 MB: a second from memory, some seconds from a disk.
        """
        parts = [self._tokens[part] for part in self._checked_slices()]
        lowest = min((int(part.min()) for part in parts), default=0)
        return lowest, max((int(part.max()) for part in parts), default=0), sum(map(len, parts))

    def refuse_ids_from(self, ids: int) -> None:
        """Refuse a dataset that contains an ID below 0 or not below `ids`, among the tokens that `range_of_ids` checks.

        Raises:
            ForeignIdError: there is one. The message names the document of the first.
        """
        for part in self._checked_slices():
            self._refuse_foreign(self._tokens[part], part.start, ids)

    @cached_property
    def document_starts(self) -> np.ndarray:
        """int64 [documents + 1]: token where each document starts in the .bin, then the number of tokens."""
        ends = np.empty(len(self.pointers) + 1, np.int64)
        np.floor_divide(self.pointers, self.dtype.itemsize, out=ends[:-1])
        ends[-1] = self.num_tokens
        if len(ends) == len(self.document_indices) and np.all(np.diff(self.document_indices) == 1):
            return ends  # every document is one sequence
        return np.asarray(ends[self.document_indices])

    def start_of(self, document: int) -> int:
        """Token where a non-empty document starts in the .bin. Reads a single entry of the index."""
        return int(self.pointers[self.document_indices[document]]) // self.dtype.itemsize

    def starts_of(self, documents: np.ndarray) -> np.ndarray:
        """int64: `start_of` each of `documents`."""
        return np.asarray(self.pointers[self.document_indices[documents]] // self.dtype.itemsize)

    @property
    def document_lengths(self) -> np.ndarray:
        """int64 [documents]: tokens of each document, 0 for an empty one."""
        return np.diff(self.document_starts)

    def get(self, index: int, offset: int = 0, length: int | None = None) -> np.ndarray:
        """Tokens of sequence `index` from `offset` on, `length` of them or all that follow: a read-only view.

        Raises:
            IndexError: outside the dataset or the sequence.
        """
        if not 0 <= index < len(self.lengths):
            raise IndexError(f"sequence {index} of {len(self.lengths)} in {self.prefix}")
        whole = int(self.lengths[index])
        length = whole - offset if length is None else length
        if offset < 0 or length < 0 or offset + length > whole:
            raise IndexError(f"tokens {offset} to {offset + length} of a sequence of {whole} in {self.prefix}")
        return self.read(int(self.pointers[index]) // self.dtype.itemsize + offset, length)

    def document(self, document: int) -> np.ndarray:
        """All tokens of one document: a read-only view."""
        start, end = self.document_starts[document : document + 2].tolist()
        return self.read(start, end - start)

    def read(self, start: int, length: int) -> np.ndarray:
        """`length` tokens from token `start` of the .bin, across documents: a read-only view.

        Raises:
            ForeignIdError: an ID is not below `ids`.
        """
        found = self._tokens[start : start + length]
        if self.ids is not None:
            self._refuse_foreign(found, start, self.ids)
        return found

    def gather(self, starts: np.ndarray, lengths: np.ndarray, out: np.ndarray) -> None:
        """Copy pieces of the .bin end to end: `lengths[i]` tokens from token `starts[i]`, together len(out).

        If `out` has the dataset's type, long pieces are copied at the speed of memcpy.

        Raises:
            ForeignIdError: an ID is not below `ids`.
        """
        self._gather(starts, lengths, out)
        if self.ids is not None and _any_foreign(out, self.ids):
            for start, length in zip(starts.tolist(), lengths.tolist(), strict=True):
                self._refuse_foreign(self._tokens[start : start + length], start, self.ids)

    def _gather(self, starts: np.ndarray, lengths: np.ndarray, out: np.ndarray) -> None:
        filled = 0
        # numpy releases the GIL while it copies or waits for the disk. Slices of a memoryview keep the GIL, but cost a
        # third of an array's slices, which matters for short documents.
        if out.dtype != self.dtype or len(out) >= _LONG * len(starts):
            for start, length in zip(starts.tolist(), lengths.tolist(), strict=True):
                out[filled : filled + length] = self._tokens[start : start + length]
                filled += length
            return
        source, target, size = self._tokens.data.cast("B"), out.data.cast("B"), self.dtype.itemsize
        for start, length in zip((starts * size).tolist(), (lengths * size).tolist(), strict=True):
            target[filled : filled + length] = source[start : start + length]
            filled += length

    def _checked_slices(self) -> list[slice]:
        """Tokens to check before a run: all, or CHECKED_BLOCKS blocks of a large .bin, its first and last included."""
        size = CHECKED_AT_ONCE // self.dtype.itemsize
        if self.num_tokens <= CHECKED_BLOCKS * size:
            return list(_slices(self.num_tokens, size))
        starts = np.linspace(0, self.num_tokens - size, CHECKED_BLOCKS).astype(np.int64).tolist()
        return [slice(start, start + size) for start in starts]

    def _refuse_foreign(self, tokens: np.ndarray, start: int, ids: int) -> None:
        """Refuse `tokens`, which start at token `start` of the .bin, if one of them is not below `ids`."""
        if not _any_foreign(tokens, ids):
            return
        place = start + int(np.argmax((tokens < 0) | (tokens >= ids)))
        sequence = int(np.searchsorted(self.pointers, place * self.dtype.itemsize, side="right")) - 1
        document = int(np.searchsorted(self.document_indices, sequence, side="right")) - 1
        raise ForeignIdError(
            f"{self.prefix}: document {document:,} contains the id {self._tokens[place]} (token "
            f"{place - self.start_of(document):,} of it), but there are {ids:,} ids, 0 to {ids - 1:,}: the dataset was "
            "made with another tokenizer or is damaged; tokenize it with the model's own tokenizer"
        )

    def _map_index(self, path: Path) -> None:
        size = path.stat().st_size
        if size < HEADER.size:
            raise UserError(f"{path}: {size} bytes, shorter than an index's header of {HEADER.size}: {AGAIN}")
        with path.open("rb") as file:
            magic, version, code, sequences, boundaries = HEADER.unpack(file.read(HEADER.size))
        _refuse_header(path, magic, version, code)
        expected = HEADER.size + 12 * sequences + 8 * boundaries
        if size != expected:
            raise UserError(
                f"{path}: {size} bytes found, {expected} expected for {sequences} sequences and {boundaries} document "
                f"boundaries ({'truncated' if size < expected else 'too long, or a multimodal dataset'}): {AGAIN}"
            )
        self.dtype = np.dtype(TOKEN_TYPES[code]).newbyteorder("<")
        buffer = _mapped(path)
        self.lengths = np.frombuffer(buffer, "<i4", sequences, HEADER.size)
        self.pointers = np.frombuffer(buffer, "<i8", sequences, HEADER.size + 4 * sequences)
        self.document_indices = np.frombuffer(buffer, "<i8", boundaries, HEADER.size + 12 * sequences)

    def _check_index(self, path: Path) -> None:
        """Refuse pointers that do not follow from the lengths, and document boundaries that do not rise from 0 to N."""
        position = 0
        for part in _slices(len(self.lengths)):
            lengths = self.lengths[part].astype(np.int64)
            ends = position + np.cumsum(lengths) * self.dtype.itemsize
            starts = ends - lengths * self.dtype.itemsize
            if np.any(lengths < 0) or not np.array_equal(starts, self.pointers[part]):
                raise UserError(f"{path}: the pointers do not follow from the lengths, the file is damaged: {AGAIN}")
            position = int(ends[-1])
        bounds = self.document_indices
        if len(bounds) == 0 or bounds[0] != 0 or bounds[-1] != len(self.lengths) or np.any(np.diff(bounds) < 0):
            raise UserError(
                f"{path}: document boundaries do not rise from 0 to {len(self.lengths)}, the file is damaged: {AGAIN}"
            )

    def _map_tokens(self, path: Path) -> None:
        size = path.stat().st_size
        expected = int(self.pointers[-1]) + int(self.lengths[-1]) * self.dtype.itemsize if len(self.lengths) else 0
        if size != expected:
            raise UserError(
                f"{path}: {size} bytes found, {expected} expected by {index_path(self.prefix).name} "
                f"({'truncated' if size < expected else 'not the file this index was written for'}): {AGAIN}"
            )
        self._tokens = np.frombuffer(_mapped(path), self.dtype) if size else np.empty(0, self.dtype)

    def _read_sidecar(self, path: Path) -> dict[str, Any] | None:
        if not path.exists():
            return None
        try:
            sidecar = json.loads(path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise UserError(f"{path}: not readable as JSON ({error}): {AGAIN}") from None
        keys = ("format", "documents", "tokens")
        recorded = tuple(sidecar.get(key) for key in keys) if isinstance(sidecar, dict) else None
        found = (SIDECAR_FORMAT, self.num_documents, self.num_tokens)
        if recorded != found:
            raise UserError(
                f"{path}: describes another dataset ({', '.join(keys)}: {recorded} recorded, {found} found): "
                "delete it if the dataset was replaced by another tool, else write the dataset again"
            )
        return dict(sidecar)


def _mapped(path: Path) -> mmap.mmap:
    with path.open("rb") as file:
        return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)


def _slices(total: int, size: int = CHECKED_AT_ONCE) -> Iterator[slice]:
    for start in range(0, total, size):
        yield slice(start, start + size)


def _any_foreign(tokens: np.ndarray, ids: int) -> bool:
    """Whether a token is below 0 or not below `ids`. One pass: as unsigned, negative numbers are the largest."""
    return len(tokens) > 0 and int(tokens.view(f"u{tokens.dtype.itemsize}").max()) >= ids


def _refuse_missing(prefix: str) -> None:
    for path in (index_path(prefix), data_path(prefix)):
        if not os.path.lexists(path):
            ending = Path(prefix).suffix
            hint = f"leave out {ending!r}, " if ending in (".bin", ".idx") else ""
            raise UserError(f"no dataset at {prefix!r}: {path} does not exist; {hint}write it with "
                            "`megalong data preprocess` (an interrupted one leaves no .idx)")  # fmt: skip
    for path in (index_path(prefix), data_path(prefix), sidecar_path(prefix)):
        if os.path.lexists(path) or path != sidecar_path(prefix):
            refuse_unreadable(path, again=AGAIN)


def _refuse_header(path: Path, magic: bytes, version: int, code: int) -> None:
    if magic != MAGIC:
        raise UserError(f"{path}: starts with {magic!r} instead of {MAGIC!r}, not an indexed dataset: {AGAIN}")
    if version != VERSION:
        raise UserError(f"{path}: index version {version} found, {VERSION} expected: {AGAIN}")
    if code not in TOKEN_TYPES:
        raise UserError(f"{path}: token type {code} found, one of {sorted(TOKEN_TYPES)} expected: {AGAIN}")
    if TOKEN_TYPES[code].startswith("float"):
        raise UserError(f"{path}: contains {TOKEN_TYPES[code]}, not tokens: give a dataset of an integer type")
