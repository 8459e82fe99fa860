"""Shuffled orders on disk, so that one rank shuffles and the others map.

Shuffling and summing ten million documents takes a second or two: nothing on one rank, wasted GPU time on 256. The rank
that prepares writes each order's arrays to `DIR/KEY.npz`; every rank then reads them. KEY is a digest of all that an
order follows from (the dataset's sizes and time of change, which documents, seed, domain, epoch or block), so a dataset
made anew at the same path never meets an old index.
"""

import hashlib
import os
import zipfile
from pathlib import Path

import numpy as np

from megalong.data.indexed import IndexedDataset, data_path, index_path


def index_key(dataset: IndexedDataset, documents: np.ndarray, seed: list[int], *what: object) -> str:
    """Digest of everything an order follows from; `what` names the order (an epoch, or a block of samples)."""
    digest = hashlib.sha256(documents.tobytes())
    for path in (index_path(dataset.prefix), data_path(dataset.prefix)):
        status = path.stat()
        digest.update(f"{path.resolve()} {status.st_size} {status.st_mtime_ns}\n".encode())
    digest.update(f"{seed} {what}".encode())
    return digest.hexdigest()[:32]


def load_index(folder: Path, key: str) -> tuple[np.ndarray, ...] | None:
    """The arrays stored under `key`, None where none were, or where the file is damaged."""
    try:
        with np.load(folder / f"{key}.npz", allow_pickle=False) as arrays:
            return tuple(arrays[name] for name in sorted(arrays.files))
    except (FileNotFoundError, ValueError, EOFError, zipfile.BadZipFile):
        return None


def save_index(folder: Path, key: str, arrays: tuple[np.ndarray, ...]) -> None:
    """Store arrays under `key`, aside first."""
    folder.mkdir(parents=True, exist_ok=True)
    aside = folder / f"{key}.tmp-{os.getpid()}"
    with aside.open("wb") as file:
        np.savez(file, *arrays)
    aside.rename(folder / f"{key}.npz")
