"""`--group-by`: records with the same key, such as the files of one repository, become one document.

Files of a group are ordered by path and joined by a newline. Groups are ordered by a hash of their key, so that they
can be divided among shards. The corpus need not fit into memory: records are first dealt into buckets on disk by that
hash. Then each bucket, which does fit, is read back, sorted and tokenized:

    part 0: a/x b/y a/z  ─┐  bucket 0: a: x z        →  document a
    part 1: b/x c/y      ─┴  bucket 1: b: x y, c: y  →  documents b, c

One group must fit into memory, as any document must. During the run the buckets take as much disk space as the
decompressed corpus.
"""

import zlib
from collections.abc import Iterator, Sequence
from itertools import groupby
from operator import itemgetter

import numpy as np
import orjson

from megalong.data.corpus.part_files import Finished, PartFolder, PartWriter
from megalong.data.corpus.sources import Source

BUCKET_BYTES = 32 << 20
LARGEST_NUMBER = 1 << 14
UNPACKED = 4  # estimated compression ratio
RUN_BYTES = 32 << 20  # buffered in memory before it is written to the buckets

Entry = tuple[str, str, list[str]]  # group, path, texts


def bucket_count(files: Sequence[Source]) -> int:
    """How many buckets a corpus needs. Depends only on its size."""
    size = sum(file.size * (1 if file.path.endswith((".jsonl", ".json", ".txt")) else UNPACKED) for file in files)
    return min(max(size // BUCKET_BYTES, 1), LARGEST_NUMBER)


class Dealer:
    """Deals the records of one part into buckets; keeps only those of the buckets `mine`."""

    def __init__(self, writer: PartWriter, buckets: int, mine: range) -> None:
        self._writer, self._buckets, self._mine = writer, buckets, mine
        self._held: dict[int, list[bytes]] = {}
        self._size = 0

    def add(self, group: str, path: str, texts: list[str]) -> None:
        """Add one record."""
        bucket = zlib.crc32(group.encode()) % self._buckets
        if bucket in self._mine:
            line = orjson.dumps([group, path, texts]) + b"\n"
            self._held.setdefault(bucket, []).append(line)
            self._size += len(line)
            if self._size >= RUN_BYTES:
                self.flush()

    def flush(self) -> None:
        """Write the buffered records, bucket by bucket, and where each bucket ends."""
        ends = np.zeros(len(self._mine) + 1, "<i8")
        for place, bucket in enumerate(self._mine, 1):
            data = b"".join(self._held.pop(bucket, []))
            self._writer.write("dealt", data)
            ends[place] = ends[place - 1] + len(data)
        self._writer.write("ends", ends.tobytes())
        self._size = 0


def dealt_bytes(dealt: Sequence[Finished]) -> int:
    """Bytes of all buckets together."""
    return sum(part.files["dealt"][0] for part in dealt if "dealt" in part.files)


def documents(
    folder: PartFolder, dealt: Sequence[Finished], place: int, buckets: int
) -> tuple[int, Iterator[list[str]]]:
    """(bytes of one bucket, its documents: for each the joined texts of every key).

    Args:
        place: index of the bucket among the dealt ones; buckets: number of dealt ones.
    """
    size, entries = 0, list[Entry]()
    for block in _blocks(folder, dealt, place, buckets):
        size += len(block)
        entries += (tuple(orjson.loads(line)) for line in block.splitlines())
    entries.sort(key=itemgetter(0, 1))  # stable: equal paths keep the order of the corpus
    groups = (files for _, files in groupby(entries, key=itemgetter(0)))
    return size, (["\n".join(texts) for texts in zip(*(entry[2] for entry in files), strict=True)] for files in groups)


def _blocks(folder: PartFolder, dealt: Sequence[Finished], place: int, buckets: int) -> Iterator[bytes]:
    for part in dealt:
        if "ends" not in part.files:
            continue
        runs = np.fromfile(folder.file(part.number, "ends"), "<i8").reshape(-1, buckets + 1)
        with folder.file(part.number, "dealt").open("rb") as file:
            start = 0
            for ends in runs:
                file.seek(start + int(ends[place]))
                yield file.read(int(ends[place + 1] - ends[place]))
                start += int(ends[-1])
