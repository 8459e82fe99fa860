"""One epoch's order on disk, so that one rank shuffles it and the others map it.

Shuffling and summing ten million documents takes a second or two: nothing on one rank, wasted GPU time on 256. The rank
that prepares writes `DIR/KEY-order.npy` and `DIR/KEY-ends.npy`; every rank then maps them. KEY is a digest of all that
the order follows from (the dataset's sizes and time of change, which documents, seed, domain, epoch), so a dataset made
anew at the same path never meets an old index.
"""

import hashlib
import os
from pathlib import Path

import numpy as np

from megalong.data.indexed import IndexedDataset, data_path, index_path

Index = tuple[np.ndarray, np.ndarray]


def index_key(dataset: IndexedDataset, documents: np.ndarray, seed: list[int], epoch: int) -> str:
    """Digest of everything an epoch's order follows from."""
    digest = hashlib.sha256(documents.tobytes())
    for path in (index_path(dataset.prefix), data_path(dataset.prefix)):
        status = path.stat()
        digest.update(f"{path.resolve()} {status.st_size} {status.st_mtime_ns}\n".encode())
    digest.update(f"{seed} {epoch}".encode())
    return digest.hexdigest()[:32]


def load_index(folder: Path, key: str) -> Index | None:
    """(order, ends) mapped from disk, None where they have not been written."""
    try:
        order, ends = (np.load(folder / f"{key}-{part}.npy", mmap_mode="r") for part in ("order", "ends"))
    except FileNotFoundError:
        return None
    return order, ends


def save_index(folder: Path, key: str, index: Index) -> None:
    """Write an epoch's index aside and rename it; `ends` last, so that a reader who finds it finds both."""
    folder.mkdir(parents=True, exist_ok=True)
    for part, array in zip(("order", "ends"), index, strict=True):
        aside = folder / f"{key}-{part}.tmp-{os.getpid()}"
        with aside.open("wb") as file:
            np.save(file, array)
        aside.rename(folder / f"{key}-{part}.npy")
