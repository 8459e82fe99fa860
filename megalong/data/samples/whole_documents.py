"""Samples of whole documents, packed by best fit. No document that fits into a sample is cut; the rest is padding.

    S = 6, documents a a a a, b b b, c c, d d d d d d d d d d        (7 tokens: 6 inputs and their targets)
    [a a a a b b b] [d d d d d d d] [d d d d c c ·]                  d is cut in two, its 7th token is in both

A document longer than S + 1 tokens is split into parts of S + 1 that share one token, so that each of its tokens but
the first is a target once. Documents are masked from each other. Padding is not a target, and no token attends to it.

Each epoch is packed as a whole by bins.py, and its samples are shuffled. Masked packing cuts a document at the end of
every sample instead; this costs a little padding. `megalong data plan` shows both.
"""

from __future__ import annotations

from functools import lru_cache, partial
from itertools import count
from typing import Any

import numpy as np

from megalong.data.samples.bins import best_fit
from megalong.data.samples.piece import Piece
from megalong.data.samples.sample import StoredTokens
from megalong.data.samples.stream import DomainStream

Packed = tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]


class WholeDocuments(DomainStream):
    """A domain whose samples are bins of whole documents. Arguments and methods are those of its base."""

    STORED_AS = "samples"  # the name of packed epochs in the index
    FIXED_COUNT = True  # whether epochs of the same documents have the same number of samples

    def __init__(self, *arguments: Any, **named: Any) -> None:
        super().__init__(*arguments, **named)
        self._samples = lru_cache(maxsize=2)(self._indexed_samples)
        self._counts: dict[int, int] = {}

    def _indexed_samples(self, epoch: int) -> Packed:
        """The samples of an epoch: (document, first token, tokens) of all parts, and the number of parts up to the end
        of each sample.
        """
        stored = self._index.load(self.STORED_AS, self.seq_length, epoch)
        documents, firsts, lengths, ends = stored if stored is not None else self._pack(epoch)
        return documents, firsts, lengths, ends

    def _pack(self, epoch: int) -> Packed:
        order = self.order(epoch)
        documents, firsts, lengths = parts(order, self.lengths[order], self.seq_length)
        bin_of, bins = best_fit(lengths, self.seq_length + 1)
        # A seed of six numbers; those of circles, epochs and blocks have fewer.
        random = np.random.RandomState([*self._seed, epoch, self.seq_length & 0xFFFFFFFF, 0])
        sample_of = random.permutation(bins)[bin_of]
        by_sample = np.argsort(sample_of, kind="stable")
        ends = np.cumsum(np.bincount(sample_of, minlength=bins))
        return documents[by_sample], firsts[by_sample], lengths[by_sample].astype(np.int32), ends

    def piece(self, j: int) -> Piece:
        """Sample j of this domain."""
        return self._bin(*self._parts_of(j))

    def _bin(self, documents: np.ndarray, firsts: np.ndarray, lengths: np.ndarray) -> Piece:
        return Bin(self, documents, firsts, lengths)

    def _parts_of(self, j: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """(document, first token, tokens) of each part of sample j."""
        for epoch in count():
            samples = self._count(epoch)
            if j < samples:
                break
            j -= samples
        documents, firsts, lengths, ends = self._samples(epoch)
        some = slice(int(ends[j - 1]) if j else 0, int(ends[j]))
        return documents[some], firsts[some], lengths[some]

    def _count(self, epoch: int) -> int:
        """Number of samples of an epoch; the same for every epoch if all have the same documents."""
        key = epoch if self.epochs.vary or not self.FIXED_COUNT else 0
        if key not in self._counts:
            self._counts[key] = len(self._samples(key)[3])
        return self._counts[key]

    def tokens_of_pieces(self, pieces: int) -> int:
        """Tokens of documents in the first `pieces` samples, estimated from the mean of the first non-empty epoch."""
        epoch = next(epoch for epoch in count() if self._count(epoch))
        lengths = self._samples(epoch)[2]
        return round(pieces * int(lengths.sum()) / self._count(epoch))

    def most_repeats(self, pieces: int) -> int:
        """How often one document may occur in the first `pieces` samples, which are drawn from whole epochs."""
        epochs = 0
        while pieces > 0:
            pieces -= self._count(epochs)
            epochs += 1
        return max(int(one.times_before(epochs).max()) for one in self.epochs.classes)

    def prepare(self, first: int, last: int) -> None:
        """Write the epochs up to sample `last`, if they are not on disk yet."""
        if last > first:
            self._store_classes()
        epoch = 0
        while last > 0:
            self._index.store(partial(self._samples, epoch), self.STORED_AS, self.seq_length, epoch)
            last -= self._count(epoch)
            epoch += 1


class Bin(Piece):
    """Documents, or parts of them: the number, first token and number of tokens of each."""

    def __init__(self, stream: WholeDocuments, documents: np.ndarray, firsts: np.ndarray, lengths: np.ndarray) -> None:
        self.stream, self._documents, self._firsts, self._lengths = stream, documents, firsts, lengths

    @property
    def tokens(self) -> StoredTokens:
        return StoredTokens(self.stream.seq_length + 1, self._copy)

    @property
    def starts(self) -> np.ndarray:
        ends = np.cumsum(self._lengths, dtype=np.int64)
        return np.concatenate([np.zeros(1, np.int64), ends[ends <= self.stream.seq_length]])

    @property
    def filled(self) -> int:
        return int(self._lengths.sum())

    @property
    def cut(self) -> tuple[bool, bool]:
        continues = self._firsts + self._lengths < self.stream.lengths[self._documents]
        return bool(np.any(self._firsts > 0)), bool(np.any(continues))

    def _copy(self, first: int, out: np.ndarray) -> None:
        ends = np.cumsum(self._lengths, dtype=np.int64)
        low = np.maximum(first, ends - self._lengths)  # [low, high): tokens of the sample to copy from each part
        high = np.maximum(low, np.minimum(first + len(out), ends))
        filled = max(0, min(len(out), int(ends[-1]) - first))
        skipped = low - (ends - self._lengths)
        some = high > low
        starts = self.stream.dataset.starts_of(self._documents[some]) + self._firsts[some] + skipped[some]
        self.stream.dataset.gather(starts, (high - low)[some], out[:filled])
        out[filled:] = 0


def parts(documents: np.ndarray, lengths: np.ndarray, seq_length: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(document, first token, tokens) of parts of at most S + 1 tokens; neighbours share one token."""
    counts = np.maximum(1, -(-(lengths - 1) // seq_length))
    which = np.repeat(np.arange(len(documents)), counts)
    number = np.arange(len(which)) - np.repeat(np.cumsum(counts) - counts, counts)
    firsts = number * seq_length
    return documents[which], firsts, np.minimum(seq_length + 1, lengths[which] - firsts)
