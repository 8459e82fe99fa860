"""A worker's task: read, check and tokenize one part, and write the result to the folder of finished parts.

    part → records → (bad ones set aside, contaminated ones dropped) → batches of texts → IDs → files of the part

Only a few numbers go back to the parent; tokens never pass through a pipe. With `--group-by` there are two such tasks:
one deals records into buckets, the other tokenizes a bucket (see grouping.py).
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from hashlib import sha256
from typing import Any

import numpy as np
import orjson

from megalong.data.corpus import grouping
from megalong.data.corpus.decontaminate import Benchmarks
from megalong.data.corpus.encoder import BatchEncoder
from megalong.data.corpus.keys import Unread, printable, unknown
from megalong.data.corpus.part_files import REJECTED, UNREAD, Finished, PartFolder, PartWriter, canonical
from megalong.data.corpus.records import Bad, Record, read_records, refuse
from megalong.data.corpus.separator import Separator, with_separator
from megalong.data.corpus.sources import LINES, Part, Piece
from megalong.data.indexed_writer import refuse_too_long

FORMAT = 2  # of finished parts; parts of another format are made again
SHOWN = 1000  # characters of a contaminated document in the report
BATCH_CHARACTERS = 1 << 18  # tokenized at once; bounds a worker's memory, unless one document is longer


@dataclass
class Reading:
    """How records are read and which of them are kept.

    Attributes:
        keys: JSON keys of texts; skip_bad: set bad records aside instead of failing.
        benchmarks, drop: benchmarks to compare with, and whether contaminated documents are dropped or only reported.
        group: the keys of group and path, None without --group-by.
    """

    keys: list[str]
    skip_bad: bool = False
    benchmarks: Benchmarks | None = None
    drop: bool = True
    group: tuple[str, str] | None = None

    def records(self, part: Part, writer: PartWriter, counts: dict[str, int]) -> Iterator[Record]:
        """The records of `part` to keep. Rejected ones are written to the part and counted."""
        keys, unread = [*self.keys, *(self.group or ())], Unread()

        def set_aside(bad: Bad) -> None:
            counts["bad"] += 1
            _write_rejected(writer, bad.piece, bad.line, bad.why, bad.data.decode("utf-8", "replace"))

        @lru_cache(maxsize=1024)  # the records of a corpus have few different sets of keys
        def unused(found: tuple[str, ...]) -> tuple[str, ...]:
            return tuple(map(printable, unknown(found, keys)))

        def count_keys(piece: Piece, found: Iterable[str]) -> None:
            unread.add(piece.source.path, unused(tuple(found)))

        for record in read_records(part, keys, set_aside if self.skip_bad else refuse, count_keys):
            hit = self.benchmarks.find(record.texts[: len(self.keys)]) if self.benchmarks else None
            if hit is not None:
                counts["contaminated"] += 1
                why = f"shares text with {hit.benchmark}: {hit.words}"
                _write_rejected(writer, record.piece, record.line, why, record.texts[0][:SHOWN])
                if self.drop:
                    continue
            yield record
        if unread.counts:
            writer.write(UNREAD, orjson.dumps(unread.counts))

    def settings(self) -> dict[str, Any]:
        """Settings that the records depend on."""
        benchmarks = [self.benchmarks.fingerprint, self.drop] if self.benchmarks else None
        return {"format": FORMAT, "keys": self.keys, "benchmarks": benchmarks, "group": self.group}

    def accepts(self, counts: dict[str, int]) -> bool:
        """Whether finished parts with these counts may be kept: with --on-error fail only those without bad records."""
        return self.skip_bad or counts["bad"] == 0


@dataclass
class Tokenizing:
    """How texts become tokens; `sha256` is the tokenizer's fingerprint."""

    encoder: BatchEncoder
    separator: Separator | None
    dtype: np.dtype[Any]
    sha256: str

    def write(self, documents: Iterable[Sequence[str]], keys: int, writer: PartWriter) -> int:
        """Tokenize `documents` (each a text for every key) into the files of a part; returns their number."""
        total = 0
        for batch in _batches(documents):
            total += len(batch)
            for place in range(keys):
                ids, lengths = self.encoder.encode([texts[place] for texts in batch])
                assert ids.max(initial=0) < self.encoder.vocabulary_size, "an id past the vocabulary would not fit"
                tokens, lengths = with_separator(ids, lengths, self.separator, self.dtype)
                refuse_too_long(lengths)
                writer.write(f"{place}.bin", tokens.data)
                writer.write(f"{place}.lengths", lengths.astype("<i4").data)
        return total

    def settings(self) -> dict[str, Any]:
        """Settings that the tokens depend on."""
        separator = self.separator.described() if self.separator else None
        return {"tokenizer": self.sha256, "separator": separator, "dtype": self.dtype.str}


@dataclass
class TokenizePart:
    """Task: tokenize a part of the corpus."""

    folder: PartFolder
    reading: Reading
    tokenizing: Tokenizing

    def __call__(self, part: Part) -> Finished:
        """The finished part, from an earlier run or made now."""
        fingerprint = self.fingerprint(part)
        done = self.folder.finished(part.number, fingerprint)
        if done is not None and self.reading.accepts(done.counts):
            return done
        counts = {"documents": 0, "bad": 0, "contaminated": 0}
        with PartWriter(self.folder, part.number) as writer:
            texts = (record.texts for record in self.reading.records(part, writer, counts))
            counts["documents"] = self.tokenizing.write(texts, len(self.reading.keys), writer)
            return writer.finish(fingerprint, counts)

    def fingerprint(self, part: Part) -> str:
        """Digest of everything that the result depends on."""
        return _fingerprint(part.pieces, self.reading.settings(), self.tokenizing.settings())


@dataclass
class DealPart:
    """Task of --group-by: deal the records of a part into buckets."""

    folder: PartFolder
    reading: Reading
    buckets: int
    mine: range

    def __call__(self, part: Part) -> Finished:
        """The dealt part, from an earlier run or made now."""
        fingerprint = _fingerprint(part.pieces, self.reading.settings(), [self.buckets, *self.mine])
        done = self.folder.finished(part.number, fingerprint)
        if done is not None and self.reading.accepts(done.counts):
            return done
        counts = {"documents": 0, "bad": 0, "contaminated": 0}
        with PartWriter(self.folder, part.number) as writer:
            dealer = grouping.Dealer(writer, self.buckets, self.mine)
            for record in self.reading.records(part, writer, counts):
                counts["documents"] += 1
                *texts, group, path = record.texts
                dealer.add(group, path, texts)
            dealer.flush()
            return writer.finish(fingerprint, counts)


@dataclass
class TokenizeBucket:
    """Task of --group-by: tokenize the groups of a bucket, given by its number."""

    folder: PartFolder
    keys: list[str]
    tokenizing: Tokenizing
    dealt_in: PartFolder
    dealt: list[Finished]
    mine: range
    _content: str = field(init=False)

    def __post_init__(self) -> None:
        self._content = canonical([part.fingerprint for part in self.dealt])

    def __call__(self, bucket: int) -> Finished:
        """The finished part, from an earlier run or made now."""
        fingerprint = self.fingerprint(bucket)
        if (done := self.folder.finished(bucket, fingerprint)) is not None:
            return done
        with PartWriter(self.folder, bucket) as writer:
            size, texts = grouping.documents(self.dealt_in, self.dealt, bucket - self.mine.start, len(self.mine))
            total = self.tokenizing.write(texts, len(self.keys), writer)
            return writer.finish(fingerprint, {"documents": total, "bad": 0, "contaminated": 0, "bytes": size})

    def fingerprint(self, bucket: int) -> str:
        """Digest of everything that the result depends on."""
        return _fingerprint(bucket, self._content, self.tokenizing.settings())


def _fingerprint(*what: object) -> str:
    return sha256(canonical(what).encode()).hexdigest()


def _batches(documents: Iterable[Sequence[str]]) -> Iterator[list[Sequence[str]]]:
    batch: list[Sequence[str]] = []
    size = 0
    for texts in documents:
        batch.append(texts)
        size += sum(map(len, texts))
        if size >= BATCH_CHARACTERS:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def _write_rejected(writer: PartWriter, piece: Piece, line: int, why: str, data: str) -> None:
    """Write a rejected record, with the start of its piece if its line is counted from there."""
    start = piece.start if piece.source.kind == LINES else 0
    writer.write(REJECTED, orjson.dumps([piece.source.path, start, line, why, data]) + b"\n")
