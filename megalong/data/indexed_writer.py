"""Writes an indexed dataset so that a killed run never leaves one that looks complete.

Tokens, lengths and document boundaries are streamed to temporary files beside the dataset (or in `folder`), so memory
does not grow with the corpus: a billion documents are 12 GB of index. `finish` builds the index from them, writes the
sidecar to a temporary file too, and publishes in the one order that is safe at every instant:

    delete the old P.idx → rename P.bin → rename P.json → rename P.idx

A dataset without .idx does not open. It has no .idx during these steps, so an old index never describes new tokens. A
killed run leaves `.tmp-` files, which nothing reads and which may be deleted at any time. In a `folder` the files have
permanent names, and a new writer continues from the state that `flush` returned.
"""

import contextlib
import errno
import json
import os
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path
from types import TracebackType
from typing import IO, Any, Self

import numpy as np

from megalong.data.indexed import (
    HEADER,
    MAGIC,
    SIDECAR_FORMAT,
    TYPE_CODES,
    VERSION,
    data_path,
    index_path,
    sidecar_path,
)
from megalong.data.lengths import LengthHistogram
from megalong.errors import UserError
from megalong.runtime.folders import sync

SLICE = 1 << 20  # index entries handled at once
State = dict[str, Any]
Entries = tuple[np.ndarray, np.ndarray, np.ndarray]
NOTHING: State = {"tokens": 0, "sequences": 0, "documents": 0, "histogram": None}


@contextlib.contextmanager
def writing(where: Path | str) -> Iterator[None]:
    """Report an I/O error while `where` is written as one line.

    Raises:
        UserError: the write failed.
    """
    try:
        yield
    except OSError as error:
        raise UserError(
            f"{where}: cannot be written ({error.strerror}); make room, or give another output prefix"
        ) from error


class IndexedDatasetWriter:
    """Writes the dataset `prefix`. A context manager that removes what it wrote unless `finish` was called.

    Args:
        folder: where to write until `finish`, on the same file system. Its files are kept if `finish` is not called.
        state: continue from this state, which an earlier writer's `flush` returned.

    Raises:
        UserError: the folder cannot be created or written to, or the disk is full.

    Example:
        with IndexedDatasetWriter("corpus_text_document", np.uint16) as writer:
            writer.add_documents(tokens=np.array([5, 6, 7, 8, 9]), lengths=np.array([3, 2]))
            writer.finish()
    """

    def __init__(
        self,
        prefix: str | Path,
        dtype: np.typing.DTypeLike,
        folder: Path | None = None,
        state: State | None = None,
    ) -> None:
        self.prefix = str(prefix)
        self.dtype = np.dtype(dtype)
        state = state or NOTHING
        self.num_tokens, self.num_sequences, self.num_documents = (state[k] for k in list(NOTHING)[:3])
        self.histogram = LengthHistogram(state["histogram"])
        self._folder = folder
        self._targets = (data_path(prefix), sidecar_path(prefix), index_path(prefix))
        self._data, self._lengths, self._bounds = (
            _opened(self._aside(ending), size) for ending, size in _sizes(state, self.dtype).items()
        )

    def add_document(self, tokens: np.ndarray, lengths: list[int] | None = None) -> None:
        """Add one document: `tokens` [n], cut into sequences of `lengths` (None: one sequence).

        An empty document has no sequences, as Megatron-LM's own tool writes it.
        """
        sequences = ([len(tokens)] if len(tokens) else []) if lengths is None else lengths
        if sum(sequences) != len(tokens):
            raise ValueError(f"sequences of {sequences} tokens do not make a document of {len(tokens)}")
        self._write_tokens(np.asarray(tokens))
        self._write_index_entries(np.asarray(sequences, np.int64), np.array([len(sequences)]), np.array([len(tokens)]))

    def add_documents(self, tokens: np.ndarray, lengths: np.ndarray) -> None:
        """Add documents of one sequence each: `tokens` [sum of lengths] end to end, `lengths` [documents]."""
        if int(np.sum(lengths, dtype=np.int64)) != len(tokens):
            raise ValueError(f"{len(lengths)} documents of {np.sum(lengths)} tokens do not make {len(tokens)} tokens")
        self._write_tokens(np.asarray(tokens))
        lengths = np.asarray(lengths, np.int64)
        self._write_index_entries(lengths[lengths > 0], lengths > 0, lengths)

    def add_file(self, tokens: Path, entries: Iterable[Entries]) -> None:
        """Add documents whose tokens are the file `tokens`, in this dataset's type. The file is copied, not parsed.

        Args:
            entries: batches of documents: (tokens of each sequence, sequences and tokens of each document).
        """
        before = self.num_tokens
        for sequences, counts, lengths in entries:
            self.num_tokens += int(np.sum(lengths, dtype=np.int64))
            self._write_index_entries(np.asarray(sequences, np.int64), counts, lengths)
        size = (self.num_tokens - before) * self.dtype.itemsize
        with writing(self.prefix):
            if tokens.stat().st_size != size:
                raise UserError(f"{tokens}: {tokens.stat().st_size} bytes found, {size} expected; it changed meanwhile")
            _append(self._data, tokens)

    def flush(self) -> State:
        """Wait until everything added is on disk. Returns the state from which a later writer can continue."""
        with writing(self.prefix):
            for file in (self._data, self._lengths, self._bounds):
                file.flush()
                os.fsync(file.fileno())
        counts = (self.num_tokens, self.num_sequences, self.num_documents, self.histogram.state())
        return dict(zip(NOTHING, counts, strict=True))

    def finish(self, sidecar: dict[str, Any] | None = None) -> None:
        """Publish the dataset. `sidecar` is written beside the counts; without one an old sidecar is removed."""
        with writing(self.prefix):
            self._publish(sidecar)

    def abandon(self) -> None:
        """Close the temporary files; remove them unless they are in a `folder`. Does nothing once published."""
        for file in (self._data, self._lengths, self._bounds):
            with contextlib.suppress(OSError):  # closing flushes buffers, which fails on a full disk
                file.close()
        if self._folder is None:
            for ending in (".bin", ".lengths", ".bounds", ".json", ".idx"):
                with contextlib.suppress(FileNotFoundError):
                    os.unlink(self._aside(ending))

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.abandon()

    def _aside(self, ending: str) -> Path:
        if self._folder is not None:
            return self._folder / f"{Path(self.prefix).name}{ending}"
        return Path(f"{self.prefix}{ending}.tmp-{os.getpid()}")

    def _publish(self, sidecar: dict[str, Any] | None) -> None:
        data, description, index = self._targets
        _close(self._data)
        with self._aside(".idx").open("wb") as file:
            self._write_index(file)
            _close(file)
        if sidecar is not None:
            with self._aside(".json").open("wb") as file:
                file.write((json.dumps(self._counts() | sidecar, indent=2) + "\n").encode())
                _close(file)
        index.unlink(missing_ok=True)
        description.unlink(missing_ok=True)
        sync(index.parent)
        for target in (data, description, index) if sidecar is not None else (data, index):
            self._aside(target.suffix).replace(target)
        sync(index.parent)

    def _counts(self) -> dict[str, Any]:
        return {
            "format": SIDECAR_FORMAT,
            "documents": self.num_documents,
            "tokens": self.num_tokens,
            "dtype": self.dtype.name,
        }

    def _write_tokens(self, tokens: np.ndarray) -> None:
        limits = np.iinfo(self.dtype)
        if len(tokens) and not limits.min <= tokens.min() <= tokens.max() <= limits.max:
            raise ValueError(f"tokens from {tokens.min()} to {tokens.max()} do not fit {self.dtype}")
        with writing(self.prefix):
            self._data.write(tokens.astype(self.dtype, copy=False).tobytes())
        self.num_tokens += len(tokens)

    def _write_index_entries(self, sequences: np.ndarray, counts: np.ndarray, lengths: np.ndarray) -> None:
        refuse_too_long(sequences)
        bounds = self.num_sequences + np.cumsum(counts, dtype=np.int64)
        with writing(self.prefix):
            self._lengths.write(sequences.astype("<i4").tobytes())
            self._bounds.write(bounds.astype("<i8").tobytes())
        self.num_sequences += len(sequences)
        self.num_documents += len(counts)
        self.histogram.add(lengths)

    def _write_index(self, file: IO[bytes]) -> None:
        code = TYPE_CODES[self.dtype.name]
        file.write(HEADER.pack(MAGIC, VERSION, code, self.num_sequences, self.num_documents + 1))
        for lengths in self._read(self._lengths, "<i4"):
            file.write(lengths.tobytes())
        start = 0
        for lengths in self._read(self._lengths, "<i4"):
            ends = start + np.cumsum(lengths, dtype=np.int64) * self.dtype.itemsize
            file.write((ends - lengths.astype(np.int64) * self.dtype.itemsize).astype("<i8").tobytes())
            start = int(ends[-1])
        file.write(bytes(8))  # the first document starts at sequence 0
        for bounds in self._read(self._bounds, "<i8"):
            file.write(bounds.tobytes())

    def _read(self, file: IO[bytes], dtype: str) -> Iterator[np.ndarray]:
        """The entries written to `file`, slice by slice."""
        file.flush()
        with open(file.name, "rb") as again:
            while len(entries := np.fromfile(again, dtype, SLICE)):
                yield entries


def has_files_of(state: State, path: Path, dtype: np.dtype[Any]) -> bool:
    """Whether a writer's files in its folder (`path` and an ending) are at least as long as `state` says."""
    files = {Path(f"{path}{ending}"): size for ending, size in _sizes(state, dtype).items()}
    return all(file.is_file() and file.stat().st_size >= size for file, size in files.items())


def refuse_too_long(lengths: np.ndarray) -> None:
    """Refuse sequences of `lengths` tokens that are too long for the index.

    Raises:
        UserError: a sequence has 2^31 tokens or more.
    """
    if len(lengths) and lengths.max() > np.iinfo(np.int32).max:
        raise UserError(f"a document of {lengths.max()} tokens: the format allows 2,147,483,647 at most; split it")


def _sizes(state: State, dtype: np.dtype[Any]) -> dict[str, int]:
    """Bytes of each temporary file: tokens, sequence lengths, document ends."""
    return {
        ".bin": state["tokens"] * dtype.itemsize,
        ".lengths": 4 * state["sequences"],
        ".bounds": 8 * state["documents"],
    }


def _opened(path: Path, size: int) -> IO[bytes]:
    """Open `path` for writing after its first `size` bytes."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        file = path.open("r+b" if size else "wb", buffering=SLICE)
        if size:
            file.truncate(size)
            file.seek(size)
        return file
    except OSError as error:
        raise UserError(f"{path.parent}: cannot be written to ({error.strerror}); give another output prefix") from None


def _append(target: IO[bytes], path: Path) -> None:
    """Append the content of `path` to `target`, inside the kernel if possible."""
    target.flush()
    with path.open("rb") as source:
        try:
            while os.copy_file_range(source.fileno(), target.fileno(), 1 << 30):
                pass
        except OSError as error:
            if error.errno not in (errno.EXDEV, errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP):
                raise
            source.seek(os.lseek(source.fileno(), 0, os.SEEK_CUR))
            shutil.copyfileobj(source, target, SLICE)
    target.seek(0, os.SEEK_END)


def _close(file: IO[bytes]) -> None:
    """Close after the bytes are on the disk, so that a rename cannot reach it first."""
    file.flush()
    os.fsync(file.fileno())
    file.close()
