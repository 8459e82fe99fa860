"""Shuffled orders on disk, so that one rank shuffles and the others map.

Shuffling and summing ten million documents takes a second or two: nothing on one rank, wasted GPU time on 256. The rank
that prepares writes each order's arrays to DIR/KEY/0.npy, 1.npy, …; every rank then maps them, which takes a
millisecond and no memory of its own, whatever their size.

KEY is a digest of all that an order follows from: the dataset's files (size, time of change, and what the sidecar
says), the split and part, seed, domain, rules, epoch or block. So a dataset made anew at the same path never meets an
old index.
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
    """The arrays of one domain's stream that are kept in `folder`; None keeps nothing.

    Args:
        prefix: the dataset.
        what: everything else that all of them follow from.
    """

    def __init__(self, folder: Path | None, prefix: str, *what: object) -> None:
        self._folder = folder
        self._base = _identity(prefix, what) if folder is not None else b""

    def load(self, *what: object) -> Arrays | None:
        """The arrays stored under `what`, mapped; None where none were, or where a file is damaged."""
        if self._folder is None:
            return None
        folder = self._folder / self._key(what)
        try:
            count = len(list(folder.iterdir()))
            return tuple(np.load(folder / f"{n}.npy", mmap_mode="r", allow_pickle=False) for n in range(count)) or None
        except (OSError, ValueError, EOFError):
            return None

    def store(self, make: Callable[[], Arrays], *what: object) -> None:
        """Make and store what is not there yet, aside first."""
        if self._folder is None or self.load(*what) is not None:
            return
        folder = self._folder / self._key(what)
        with folder_aside(folder, replace=True) as aside:  # what is there is damaged
            for number, array in enumerate(make()):
                np.save(aside / f"{number}.npy", array)

    def _key(self, what: tuple[object, ...]) -> str:
        return hashlib.sha256(self._base + repr(what).encode()).hexdigest()[:32]


def _identity(prefix: str, what: tuple[object, ...]) -> bytes:
    """Digest of the dataset's files and `what`; a file that is missing is told when the dataset is opened."""
    digest = hashlib.sha256(repr(what).encode())
    for path in (index_path(prefix), data_path(prefix)):
        if path.exists():
            status = path.stat()
            digest.update(f"{path.resolve()} {status.st_size} {status.st_mtime_ns}\n".encode())
    if sidecar_path(prefix).is_file():
        digest.update(sidecar_path(prefix).read_bytes())
    return digest.digest()
