"""Appends the finished parts to the datasets, in order.

A part is deleted once its bytes are known to be on disk, and a journal records how far that is done. The dataset
therefore needs its disk space once, not twice, and a run that is killed here continues here.

    000000 000001 | 000002 000003        journal: 2 parts, 81,920 tokens, …
    appended, deleted   to do
"""

import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
import orjson

from megalong.data.corpus.keys import Unread
from megalong.data.corpus.part_files import REJECTED, UNREAD, Finished, PartFolder
from megalong.data.corpus.records import lines_before
from megalong.data.indexed_writer import IndexedDatasetWriter, State, has_files_of
from megalong.errors import UserError
from megalong.runtime.folders import file_aside

FLUSH_BYTES = 1 << 30  # appended between two flushes: at most this much is on disk twice

Counts = dict[str, int]


class Assembly:
    """The datasets `prefixes` (one per key) while they are assembled from the parts with these `fingerprints`.

    Args:
        acceptable: whether parts of an earlier run with these counts may be kept.

    Attributes:
        done: parts already appended, those of an earlier run included.
        counts: sums of the counts of these parts.
    """

    def __init__(
        self,
        folder: PartFolder,
        prefixes: Sequence[str],
        dtype: np.dtype[Any],
        fingerprints: Sequence[str],
        acceptable: Callable[[Counts], bool],
    ) -> None:
        self._folder, self._fingerprints, self._acceptable = folder, fingerprints, acceptable
        self._waiting: list[Finished] = []
        self._bytes = 0
        journal = self._journal(prefixes, dtype)
        self.done: int = journal["parts"]
        self.counts: Counts = journal["counts"]
        states: list[State | None] = journal["states"] or [None] * len(prefixes)
        self.writers = [
            IndexedDatasetWriter(prefix, dtype, folder.path, state)
            for prefix, state in zip(prefixes, states, strict=True)
        ]

    def add(self, part: Finished) -> None:
        """Append the next part."""
        for place, writer in enumerate(self.writers):
            if f"{place}.bin" in part.files:
                lengths = np.fromfile(self._folder.file(part.number, f"{place}.lengths"), "<i4")
                tokens = self._folder.file(part.number, f"{place}.bin")
                writer.add_file(tokens, [(lengths[lengths > 0], lengths > 0, lengths)])
                self._bytes += part.files[f"{place}.bin"][0]
        for name, count in part.counts.items():
            self.counts[name] = self.counts.get(name, 0) + count
        self.done += 1
        self._waiting.append(part)
        if self._bytes >= FLUSH_BYTES:
            self._flush()

    def close(self) -> None:
        """Close all files, finished or not."""
        for writer in self.writers:
            writer.abandon()

    def _flush(self) -> None:
        states = [writer.flush() for writer in self.writers]
        journal = {"parts": self.done, "identity": self._identity(self.done), "counts": self.counts, "states": states}
        with file_aside(self._folder.path / "journal", durable=True) as aside:
            aside.write_text(json.dumps(journal))
        for part in self._waiting:
            self._folder.remove(part)
        self._waiting, self._bytes = [], 0

    def _journal(self, prefixes: Sequence[str], dtype: np.dtype[Any]) -> dict[str, Any]:
        """The journal of an earlier run of the same work; else an empty one, and a journal that is there is deleted.

        A run that was killed while it published has already moved datasets that its journal still describes. If that
        journal stayed, the run after the next would apply it to the first bytes of a new dataset.
        """
        nothing: dict[str, Any] = {"parts": 0, "counts": {}, "states": None}
        path = self._folder.path / "journal"
        try:
            journal: dict[str, Any] = json.loads(path.read_bytes())
        except (OSError, ValueError):
            return nothing
        same = journal["identity"] == self._identity(journal["parts"]) and len(journal["states"]) == len(prefixes)
        if same and self._has_files(journal["states"], prefixes, dtype) and self._acceptable(journal["counts"]):
            return journal
        path.unlink()
        return nothing

    def _has_files(self, states: Sequence[State], prefixes: Sequence[str], dtype: np.dtype[Any]) -> bool:
        """Whether the unfinished datasets have the files that `states` describe."""
        return all(
            has_files_of(state, self._folder.path / Path(prefix).name, dtype)
            for state, prefix in zip(states, prefixes, strict=True)
        )

    def _identity(self, parts: int) -> str:
        return sha256("".join(self._fingerprints[:parts]).encode()).hexdigest()


def publish_rejected(folders: Sequence[PartFolder], path: Path) -> int:
    """Collect the rejected records in `path`, one JSON object per record, with the line number in its file.

    Returns their number. Without any no file is written, and one of an earlier run is deleted.

    Raises:
        UserError: the disk is full.
    """
    aside = folders[0].path / f"{path.name}.tmp"  # in this folder, so that one of a killed run is cleaned up
    count = 0
    try:
        with aside.open("wb") as file:
            for count, entry in enumerate(_rejected(folders), 1):  # noqa: B007
                file.write(orjson.dumps(entry) + b"\n")
        if count:
            aside.replace(path)
        else:
            path.unlink(missing_ok=True)
    except OSError as error:
        raise UserError(f"{path}: cannot be written ({error.strerror}); make room") from None
    finally:
        aside.unlink(missing_ok=True)
    return count


def unread_keys(folders: Iterable[PartFolder]) -> Unread:
    """The unused keys of all parts."""
    found = Unread()
    for folder in folders:
        for file in sorted(folder.path.glob(f"*.{UNREAD}")):
            for path, counts in orjson.loads(file.read_bytes()).items():
                for key, count in counts.items():
                    found.add(path, [key], count)
    return found


def _rejected(folders: Iterable[PartFolder]) -> Iterator[dict[str, Any]]:
    for folder in folders:
        for file in sorted(folder.path.glob(f"*.{REJECTED}")):
            for line in file.read_bytes().splitlines():
                path, start, number, why, data = orjson.loads(line)
                yield {"file": path, "line": number + lines_before(path, start), "reason": why, "data": data}
