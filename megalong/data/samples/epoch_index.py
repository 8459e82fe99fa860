"""Shuffled orders on disk, so that one rank shuffles and the others map the result.

Shuffling and summing ten million documents takes a second or two: nothing on one rank, but wasted GPU time on 256. The
rank that calls `prepare` writes the arrays of each order to DIR/KEY/0.npy, 1.npy, … Every rank then memory-maps them,
which takes a millisecond and no extra memory, whatever their size.

KEY is a digest of everything that decides an order: the dataset's files (size, modification time, sidecar), the split
and part, seed, domain, rules, epoch or block. A rewritten dataset at the same path therefore never gets an old index.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path

import numpy as np

from megalong.data.indexed import data_path, index_path, sidecar_path
from megalong.runtime.folders import folder_aside

Arrays = tuple[np.ndarray, ...]


class EpochIndex:
    """The arrays of one domain's stream, stored in `folder`; None stores nothing.

    Args:
        prefix: the dataset.
        what: everything else that decides all of them.
    """

    def __init__(self, folder: Path | None, prefix: str, *what: object) -> None:
        self._folder = folder
        self._base = _identity(prefix, what) if folder is not None else b""

    def load(self, *what: object) -> Arrays | None:
        """The arrays stored under `what`, memory-mapped; None if nothing is stored or a file is damaged."""
        if self._folder is None:
            return None
        folder = self._folder / self._key(what)
        try:
            count = len(list(folder.iterdir()))
            return tuple(np.load(folder / f"{n}.npy", mmap_mode="r", allow_pickle=False) for n in range(count)) or None
        except (OSError, ValueError, EOFError):
            return None

    def store(self, make: Callable[[], Arrays], *what: object) -> None:
        """Compute and store the arrays of `what`, atomically, unless they are already stored."""
        if self._folder is None or self.load(*what) is not None:
            return
        folder = self._folder / self._key(what)
        with folder_aside(folder, replace=True) as aside:  # an existing folder is damaged
            for number, array in enumerate(make()):
                np.save(aside / f"{number}.npy", array)

    def _key(self, what: tuple[object, ...]) -> str:
        return hashlib.sha256(self._base + repr(what).encode()).hexdigest()[:32]


def _identity(prefix: str, what: tuple[object, ...]) -> bytes:
    """Digest of the dataset's files and `what`. A missing file is reported later, when the dataset is opened."""
    digest = hashlib.sha256(repr(what).encode())
    for path in (index_path(prefix), data_path(prefix)):
        if path.exists():
            status = path.stat()
            digest.update(f"{path.resolve()} {status.st_size} {status.st_mtime_ns}\n".encode())
    if sidecar_path(prefix).is_file():
        digest.update(sidecar_path(prefix).read_bytes())
    return digest.digest()
