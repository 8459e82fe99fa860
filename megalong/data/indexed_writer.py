"""Writing an indexed dataset so that a killed run is never mistaken for a whole one.

Tokens stream into `P.bin.tmp-PID`; only lengths stay in memory (4 bytes a sequence, 8 a document). `finish` writes the
index and the sidecar aside too, then publishes in the one order that is safe at every instant:

    delete the old P.idx → rename P.bin → rename P.json → rename P.idx

A dataset without .idx does not open, so from the first step to the last there is none: never the old index over new
tokens. What a killed run leaves behind are `.tmp-` files, which nothing reads and which may be deleted at any time.
"""

import contextlib
import json
import os
from array import array
from collections.abc import Iterator
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
from megalong.errors import UserError
from megalong.runtime.folders import sync


class IndexedDatasetWriter:
    """Writes the dataset `prefix`; a context manager that removes what it wrote unless `finish` was reached.

    Raises:
        UserError: the folder cannot be made or written to, or the disk is full.

    Example:
        with IndexedDatasetWriter("corpus_text_document", np.uint16) as writer:
            writer.add_documents(tokens=np.array([5, 6, 7, 8, 9]), lengths=np.array([3, 2]))
            writer.finish()
    """

    def __init__(self, prefix: str | Path, dtype: np.typing.DTypeLike) -> None:
        self.prefix = str(prefix)
        self.dtype = np.dtype(dtype)
        self.lengths = array("i")
        self.document_indices = array("q", [0])
        self.num_tokens = 0
        self._targets = (data_path(prefix), sidecar_path(prefix), index_path(prefix))
        self._data = _created(_aside(data_path(prefix)))

    @property
    def num_documents(self) -> int:
        """Documents added so far."""
        return len(self.document_indices) - 1

    def add_document(self, tokens: np.ndarray, lengths: list[int] | None = None) -> None:
        """One document: `tokens` [n], cut into sequences of `lengths` (one sequence unless told otherwise).

        An empty document is a document without sequences, as Megatron-LM's own tool writes it.
        """
        sequences = ([len(tokens)] if len(tokens) else []) if lengths is None else lengths
        if sum(sequences) != len(tokens):
            raise ValueError(f"sequences of {sequences} tokens do not make a document of {len(tokens)}")
        self._write(np.asarray(tokens))
        self.lengths.extend(_checked_lengths(np.asarray(sequences, np.int64)).tolist())
        self.document_indices.append(len(self.lengths))

    def add_documents(self, tokens: np.ndarray, lengths: np.ndarray) -> None:
        """Many documents of one sequence each: `tokens` [sum of lengths] end to end, `lengths` [documents]."""
        if int(np.sum(lengths, dtype=np.int64)) != len(tokens):
            raise ValueError(f"{len(lengths)} documents of {np.sum(lengths)} tokens do not make {len(tokens)} tokens")
        self._write(np.asarray(tokens))
        lengths = _checked_lengths(np.asarray(lengths, np.int64))
        first = len(self.lengths)
        self.lengths.frombytes(lengths[lengths > 0].astype(np.int32).tobytes())
        self.document_indices.frombytes((first + np.cumsum(lengths > 0, dtype=np.int64)).tobytes())

    def finish(self, sidecar: dict[str, Any] | None = None) -> None:
        """Publish the dataset; `sidecar` describes it beside the counts, without one an old description is removed."""
        with self._told():
            self._publish(sidecar)

    def _publish(self, sidecar: dict[str, Any] | None) -> None:
        data, description, index = self._targets
        _close(self._data)
        with _aside(index).open("wb") as file:
            self._write_index(file)
            _close(file)
        if sidecar is not None:
            with _aside(description).open("wb") as file:
                file.write((json.dumps(self._counts() | sidecar, indent=2) + "\n").encode())
                _close(file)
        index.unlink(missing_ok=True)
        description.unlink(missing_ok=True)
        sync(index.parent)
        for target in (data, description, index) if sidecar is not None else (data, index):
            _aside(target).replace(target)
        sync(index.parent)

    def abandon(self) -> None:
        """Remove what was written aside; does nothing once published."""
        with contextlib.suppress(OSError):  # closing writes what is buffered, for which a full disk has no room
            self._data.close()
        for target in self._targets:
            _aside(target).unlink(missing_ok=True)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.abandon()

    @contextlib.contextmanager
    def _told(self) -> Iterator[None]:
        """Turn what the disk says into one line."""
        try:
            yield
        except OSError as error:
            raise UserError(
                f"{self.prefix}: cannot be written ({error.strerror}); make room, or give another output prefix"
            ) from error

    def _counts(self) -> dict[str, Any]:
        return {
            "format": SIDECAR_FORMAT,
            "documents": self.num_documents,
            "tokens": self.num_tokens,
            "dtype": self.dtype.name,
        }

    def _write(self, tokens: np.ndarray) -> None:
        limits = np.iinfo(self.dtype)
        if len(tokens) and not limits.min <= tokens.min() <= tokens.max() <= limits.max:
            raise ValueError(f"tokens from {tokens.min()} to {tokens.max()} do not fit {self.dtype}")
        with self._told():
            self._data.write(tokens.astype(self.dtype, copy=False).tobytes())
        self.num_tokens += len(tokens)

    def _write_index(self, file: Any) -> None:
        lengths = np.frombuffer(self.lengths, np.int32)
        bounds = np.frombuffer(self.document_indices, np.int64)
        ends = np.cumsum(lengths, dtype=np.int64) * self.dtype.itemsize
        file.write(HEADER.pack(MAGIC, VERSION, TYPE_CODES[self.dtype.name], len(lengths), len(bounds)))
        file.write(lengths.tobytes())
        file.write((ends - lengths.astype(np.int64) * self.dtype.itemsize).tobytes())
        file.write(bounds.tobytes())


def _checked_lengths(lengths: np.ndarray) -> np.ndarray:
    if len(lengths) and lengths.max() > np.iinfo(np.int32).max:
        raise UserError(
            f"a document of {lengths.max()} tokens: the format holds 2,147,483,647 at most; cut it into several"
        )
    return lengths


def _aside(target: Path) -> Path:
    return target.with_name(f"{target.name}.tmp-{os.getpid()}")


def _created(path: Path) -> IO[bytes]:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        return path.open("wb")
    except OSError as error:
        raise UserError(f"{path.parent}: cannot be written to ({error.strerror}); give another output prefix") from None


def _close(file: Any) -> None:
    """Close only when the bytes are on the disk: a rename must not overtake them."""
    file.flush()
    os.fsync(file.fileno())
    file.close()
