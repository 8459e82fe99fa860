"""A run over the parts of a corpus, from a folder of finished parts (empty, or left by a killed run) to the datasets.

    parts → workers (tokenize_part.py) → finished parts → assembly, in order (assemble.py) → published

If the run fails, the folder is kept if it contains finished parts.
"""

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import accumulate
from pathlib import Path
from typing import Any

from megalong.data.corpus.assemble import Assembly, publish_rejected, unread_keys
from megalong.data.corpus.grouping import dealt_bytes
from megalong.data.corpus.part_files import Finished, PartFolder
from megalong.data.corpus.sources import Part
from megalong.data.corpus.tokenize_part import DealPart, Reading, TokenizeBucket, TokenizePart, Tokenizing
from megalong.data.indexed_writer import IndexedDatasetWriter
from megalong.data.progress import Progress
from megalong.data.workers import map_in_order
from megalong.errors import UserError

PARTS_AHEAD = 64  # per worker: one slow part (a large .gz) must not block the others; waiting parts take no memory

Check = Callable[[], None]


class Run:
    """One run over the parts of one shard.

    Args:
        turns: parts after which a worker is replaced: gigatoken caches every word it has seen, without a limit.
    """

    def __init__(self, prefix: str, reading: Reading, tokenizing: Tokenizing, workers: int, turns: int) -> None:
        self._reading, self._tokenizing, self._workers = reading, tokenizing, workers
        self._prefix, self._turns = prefix, turns
        self._folder = PartFolder(Path(f"{prefix}.parts"))
        self._dealt_in: PartFolder | None = None
        self._assembly: Assembly | None = None
        self._cleared = self._discard = False
        self.counts = {"documents": 0, "bad": 0, "contaminated": 0}
        self.seconds = 0.0

    @property
    def writers(self) -> list[IndexedDatasetWriter]:
        """One per key, complete after `tokenize`."""
        assert self._assembly is not None
        return self._assembly.writers

    def tokenize(self, parts: Sequence[Part], shard: int, shards: int, buckets: int | None, check: Check) -> None:
        """Tokenize share `shard` (from 0) of `shards`: of `parts`, or of `buckets` buckets if records are grouped.

        Args:
            check: called once the workers are busy. If it raises, their results are discarded.
        """

        def checked() -> None:
            try:
                check()
            except UserError:
                self._discard = True  # the folder is cleared after the workers have stopped: one may still be writing
                raise

        if buckets is None:
            mine = parts[len(parts) * shard // shards : len(parts) * (shard + 1) // shards]
            task = TokenizePart(self._folder, self._reading, self._tokenizing)
            read = [0, *accumulate(part.size for part in mine)]
            self._assemble(task, mine, [part.number for part in mine], read[-1], lambda done: read[done.done], checked)
            return
        numbers = range(buckets * shard // shards, buckets * (shard + 1) // shards)
        self._dealt_in = PartFolder(self._folder.path / "dealt")
        deal = DealPart(self._dealt_in, self._reading, buckets, numbers)
        dealt = self._deal(deal, parts, checked)
        for part in dealt:
            self._count(part)
        bucket_task = TokenizeBucket(self._folder, self._reading.keys, self._tokenizing, self._dealt_in, dealt, numbers)
        size = dealt_bytes(dealt)
        self._assemble(
            bucket_task, numbers, list(numbers), size, lambda done: done.counts.get("bytes", 0), grouped=True
        )

    def refuse_empty(self, inputs: Sequence[str]) -> None:
        """Refuse a corpus that has no token under one of the keys."""
        for key, writer in zip(self._reading.keys, self.writers, strict=True):
            if writer.num_tokens == 0:
                found = f"{writer.num_documents:,} documents, all empty" if writer.num_documents else "no document"
                self._clear()
                raise UserError(
                    f"--input: empty corpus: {found} under {key!r} in {' '.join(inputs)}; give files with text"
                )

    def publish(self, about: dict[str, Any]) -> list[IndexedDatasetWriter]:
        """Publish the datasets, with `about` and the counts in their sidecars, and delete the finished parts."""
        folders = [self._folder, *([self._dealt_in] if self._dealt_in else [])]
        log = Path(f"{self._prefix}_rejected.jsonl")
        if publish_rejected(folders, log):
            print(f"{log}: {self.counts['bad']:,} bad records, {self.counts['contaminated']:,} contaminated documents")
        for line in unread_keys(folders).lines():
            print(f"megalong: --input: {line}", file=sys.stderr)
        for key, writer in zip(self._reading.keys, self.writers, strict=True):
            writer.finish(
                {
                    "key": key,
                    "empty_documents": writer.histogram.empty,
                    "bad_records": self.counts["bad"],
                    "contaminated_documents": self.counts["contaminated"],
                    **about,
                    "length_histogram": writer.histogram.buckets(),
                }
            )
        self._clear()
        return self.writers

    @contextmanager
    def kept_on_failure(self) -> Iterator[None]:
        """On any failure close all files, and keep the folder only if it contains finished parts."""
        try:
            yield
        except BaseException as error:
            if self._discard:
                self._clear()
            if self._cleared:
                raise
            kept = self._assembly.done if self._assembly else 0
            kept = max(kept, *(folder.finished_count() for folder in (self._folder, self._dealt_in) if folder))
            if kept == 0:
                self._clear()
            elif isinstance(error, UserError | KeyboardInterrupt):
                hint = (
                    f"at least {kept} finished parts are kept in {self._folder.path}: run the same command to "
                    "continue, or delete the folder"
                )
                if isinstance(error, KeyboardInterrupt):
                    raise KeyboardInterrupt(hint) from None
                raise UserError(f"{error} ({hint})") from None
            raise
        finally:
            if self._assembly is not None:
                self._assembly.close()
            for folder in (self._folder, self._dealt_in):
                if folder is not None:
                    folder.release()

    def _assemble(
        self,
        task: Any,
        items: Sequence[Any],
        numbers: Sequence[int],
        size: int,
        read: Callable[[Assembly], int],
        meanwhile: Check | None = None,
        grouped: bool = False,
    ) -> None:
        """Run `task` on `items` (the parts `numbers`) and append the results in order.

        Args:
            size: bytes of all items; read: bytes of the items already appended.
            grouped: whether this is the second pass of --group-by.
        """
        prefixes = [f"{self._prefix}_{key}_document" for key in self._reading.keys]
        fingerprints = [task.fingerprint(item) for item in items]
        self._folder.discard_all_but(numbers)
        self._assembly = Assembly(self._folder, prefixes, self._tokenizing.dtype, fingerprints, self._reading.accepts)
        done = self._assembly.done
        progress = Progress(
            size,
            doing="tokenizing groups, 2 of 2" if grouped else "",
            position=read(self._assembly),
            documents=self.writers[0].num_documents,
        )
        workers = min(self._workers, max(len(items) - done, 1))
        results = map_in_order(task, items[done:], workers, PARTS_AHEAD, meanwhile, self._turns)
        try:
            for _, part in results:
                self._assembly.add(part)
                progress.update(read(self._assembly), self.writers[0].num_documents)
        finally:
            results.close()
            progress.finish()
        for name in self.counts:
            self.counts[name] += self._assembly.counts.get(name, 0)
        self.seconds = progress.seconds

    def _deal(self, task: DealPart, parts: Sequence[Part], meanwhile: Check) -> list[Finished]:
        assert self._dealt_in is not None
        self._dealt_in.discard_all_but(range(len(parts)))
        progress = Progress(sum(part.size for part in parts), what="records", doing="sorting into groups, 1 of 2")
        results = map_in_order(task, parts, min(self._workers, len(parts)), PARTS_AHEAD, meanwhile, self._turns)
        dealt: list[Finished] = []
        size = records = 0
        try:
            for part, done in results:
                dealt.append(done)
                size, records = size + part.size, records + done.counts["documents"]
                progress.update(size, records)
        finally:
            results.close()
            progress.finish()
        return dealt

    def _count(self, part: Finished) -> None:
        for name in ("bad", "contaminated"):
            self.counts[name] += part.counts[name]

    def _clear(self) -> None:
        if self._assembly is not None:
            self._assembly.close()
        self._folder.clear()
        self._cleared = True
