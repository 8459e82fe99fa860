"""Which blocks of queries and keys a rank computes: causal, inside documents, inside the window.

A rank's tokens are runs of consecutive tokens (layout.py). Cut at document starts, these become pieces. All queries of
a piece see the same keys of another rank, which a binary search finds:

    queries [a, b) of a document that starts at d       own keys             causal
                                                        another rank's keys  those in [d, a), without a mask
                                                        all keys at once     [d, b), cut by the diagonal

With a sliding window, a second diagonal cuts the block. Nothing here is as large as the sequence, let alone S x S: a
plan has about documents times ranks blocks.

Every block is trimmed so that each of its queries sees a key and each of its keys is seen. A block that only a lower
diagonal cuts has no more queries than keys.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, TypeVar

import numpy as np

from megalong.attention.layout import Runs, TokenLayout, tokens_of, union
from megalong.attention.mask import CAUSAL, FULL, BlockMask

T = TypeVar("T")


@dataclass(frozen=True)
class Block:
    """A run of one rank's queries and a run of one rank's keys, as local token indices."""

    queries: slice
    keys: slice
    mask: BlockMask


@dataclass(frozen=True)
class Shard:
    """The tokens of one rank, or of several ranks combined."""

    runs: Runs

    @cached_property
    def offsets(self) -> np.ndarray:
        """Tokens before each run."""
        lengths = self.runs[:, 1] - self.runs[:, 0]
        return np.asarray(np.cumsum(lengths) - lengths)

    def first_at(self, positions: np.ndarray) -> np.ndarray:
        """Number of this shard's tokens before each of `positions`."""
        run = np.searchsorted(self.runs[:, 1], positions, side="right")
        inside = run < len(self.runs)
        run = np.minimum(run, len(self.runs) - 1)
        starts, stops = self.runs[run, 0], self.runs[run, 1]
        return np.asarray(self.offsets[run] + np.where(inside, np.maximum(0, positions - starts), stops - starts))

    def pieces(self, starts: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        """Runs cut at document starts: (begin, end, tokens before the piece in this shard, start of its document)."""
        run = np.searchsorted(self.runs[:, 0], starts, side="right") - 1
        inside = (run >= 0) & (starts < self.runs[run, 1])
        begin = np.union1d(self.runs[:, 0], starts[inside])
        run = np.searchsorted(self.runs[:, 0], begin, side="right") - 1
        end = np.minimum(np.append(begin[1:], self.runs[-1, 1]), self.runs[run, 1])
        document = starts[np.searchsorted(starts, begin, side="right") - 1]
        return begin, end, self.offsets[run] + begin - self.runs[run, 0], document


@dataclass(frozen=True)
class SequencePlan:
    """One sequence: its length, the first tokens of its documents (int64, from 0), and every rank's tokens."""

    seq_length: int
    starts: np.ndarray
    shards: tuple[Shard, ...]

    def joined(self, size: int) -> SequencePlan:
        """The same plan with every `size` neighbouring ranks merged into one."""
        if size == 1:
            return self
        groups = (self.shards[i : i + size] for i in range(0, len(self.shards), size))
        return SequencePlan(
            self.seq_length, self.starts, tuple(Shard(union([shard.runs for shard in group])) for group in groups)
        )

    def order(self, ranks: slice) -> np.ndarray:
        """Indices that sort the concatenated tokens of `ranks` by position."""
        return np.argsort(np.concatenate([tokens_of(shard.runs) for shard in self.shards[ranks]]), kind="stable")

    def between(self, rank: int, source: int, window: int | None) -> list[Block]:
        """The blocks of `rank`'s queries against `source`'s keys."""
        queries, keys = self.shards[rank], self.shards[source]
        if window is not None:
            return _windowed(queries, keys, self.starts, window)
        return _causal(queries, self.starts) if source == rank else _earlier(queries, keys, self.starts)

    def to_all(self, rank: int, window: int | None) -> list[Block]:
        """The blocks of `rank`'s queries against the keys of the whole sequence in order."""
        if window is not None:
            return _windowed(self.shards[rank], Shard(np.array([[0, self.seq_length]])), self.starts, window)
        begin, end, local, document = self.shards[rank].pieces(self.starts)
        return [
            Block(slice(first, first + b - a), slice(d, b), BlockMask(upper=a - d))
            for a, b, first, d in _rows(begin, end, local, document)
        ]


@dataclass(frozen=True)
class AttentionPlan:
    """The sequences of a micro-batch: one plan for all rows if they are alike, else one per row.

    Results are cached on host and device for the lifetime of the micro-batch, so all layers share them.
    """

    sequences: tuple[SequencePlan, ...]
    _cache: dict[Hashable, Any] = field(default_factory=dict, repr=False, compare=False)

    def cached(self, key: Hashable, make: Callable[[], T]) -> T:
        """`make()`, called once and cached with the plan. `key` must contain everything that it depends on."""
        if key not in self._cache:
            self._cache[key] = make()
        return self._cache[key]

    def rows(self) -> list[tuple[slice, SequencePlan]]:
        """(rows of the batch, their plan)."""
        if len(self.sequences) == 1:
            return [(slice(None), self.sequences[0])]
        return [(slice(row, row + 1), sequence) for row, sequence in enumerate(self.sequences)]

    def orders(self, ranks: slice, joined: int) -> list[np.ndarray]:
        """`SequencePlan.order` of each sequence."""
        key = ("order", ranks.start, ranks.stop, joined)
        return self.cached(key, lambda: [sequence.joined(joined).order(ranks) for sequence in self.sequences])

    def blocks(
        self, rank: int, source: int | None, window: int | None, joined: int = 1
    ) -> list[tuple[slice, list[Block]]]:
        """(rows of the batch, blocks) of `rank`'s queries against `source`'s keys, None for all keys in order.

        Ranks are counted in groups of `joined`.
        """
        return self.cached(
            ("blocks", rank, source, window, joined), lambda: list(self._blocks(rank, source, window, joined))
        )

    def _blocks(
        self, rank: int, source: int | None, window: int | None, joined: int
    ) -> Iterator[tuple[slice, list[Block]]]:
        for rows, sequence in self.rows():
            plan = sequence.joined(joined)
            yield rows, plan.to_all(rank, window) if source is None else plan.between(rank, source, window)


def make_plan(layout: TokenLayout, seq_length: int, starts: Sequence[np.ndarray] | None = None) -> AttentionPlan:
    """The plan of a micro-batch.

    Args:
        starts: for each row the first tokens of its documents, from 0; None: every row is one document.
    """
    whole = [np.zeros(1, np.int64)] if starts is None else list(starts)
    if len(whole) > 1 and all(np.array_equal(row, whole[0]) for row in whole[1:]):
        whole = whole[:1]
    return AttentionPlan(
        tuple(
            SequencePlan(seq_length, row, tuple(Shard(runs) for runs in layout.runs(seq_length, row))) for row in whole
        )
    )


def _rows(*columns: np.ndarray) -> zip[tuple[int, ...]]:
    return zip(*(column.tolist() for column in columns), strict=True)


def _causal(shard: Shard, starts: np.ndarray) -> list[Block]:
    """A rank's tokens are in order, so its own block of a document has a causal mask, even across gaps."""
    begin, end, local, document = shard.pieces(starts)
    first = np.flatnonzero(np.append(True, document[1:] != document[:-1]))
    lows, highs = local[first], np.append(local[first[1:]], local[-1] + end[-1] - begin[-1])
    return [Block(slice(low, high), slice(low, high), CAUSAL) for low, high in _rows(lows, highs)]


def _earlier(queries: Shard, keys: Shard, starts: np.ndarray) -> list[Block]:
    begin, end, local, document = queries.pieces(starts)
    low, high = keys.first_at(document), keys.first_at(begin)
    blocks: list[Block] = []
    for first, length, lo, hi in _rows(local, end - begin, low, high):
        if lo == hi:
            continue
        if blocks and blocks[-1].queries.stop == first and blocks[-1].keys == slice(lo, hi):
            first, length = blocks[-1].queries.start, first + length - blocks.pop().queries.start
        blocks.append(Block(slice(first, first + length), slice(lo, hi), FULL))
    return blocks


def _windowed(queries: Shard, keys: Shard, starts: np.ndarray, window: int) -> list[Block]:
    blocks: list[Block] = []
    for a, b, local, document in _rows(*queries.pieces(starts)):
        oldest = max(document, a - window + 1)
        run = int(np.searchsorted(keys.runs[:, 1], oldest, side="right"))
        while run < len(keys.runs) and keys.runs[run, 0] < b:
            start, stop = keys.runs[run].tolist()
            to_local = int(keys.offsets[run]) - start
            blocks += _banded(a, b, local - a, max(start, oldest), min(stop, b), to_local, window)
            run += 1
    return blocks


def _banded(a: int, b: int, to_local: int, c: int, e: int, keys_to_local: int, window: int) -> Iterator[Block]:
    """Queries [a, b) against keys [c, e) of the same document, without the queries that see none of them.

    If the window hides early keys but no key lies ahead of a query, the queries that see all keys form a block of their
    own: flash cannot express a lower diagonal alone if there are more queries than keys.
    """
    first, last = max(a, c), min(b, e + window - 1)
    ahead = e - 1 > first
    complete = first if ahead else max(first, min(last, c + window))  # queries before it see every key from c on
    if first < complete:
        yield _block(first, complete, to_local, c, e, keys_to_local, BlockMask())
    if complete < last:
        oldest = c if ahead else max(c, complete - window + 1)
        upper = complete - oldest if ahead else None
        lower = complete - oldest - window + 1 if oldest < last - window else None
        yield _block(complete, last, to_local, oldest, e, keys_to_local, BlockMask(upper, lower))


def _block(a: int, b: int, to_local: int, c: int, e: int, keys_to_local: int, mask: BlockMask) -> Block:
    return Block(slice(a + to_local, b + to_local), slice(c + keys_to_local, e + keys_to_local), mask)
