"""Samples of whole documents, best fit: none is cut that fits into a sample, and what stays free is padded.

    S = 6, documents a a a a, b b b, c c, d d d d d d d d d d        (7 tokens hold 6 inputs and their targets)
    [a a a a b b b] [d d d d d d d] [d d d d c c ·]                  d is cut in two, its 7th token stands in both

A document longer than S + 1 tokens becomes pieces of S + 1 that share one token, so that every token of it but the
first is a target once. Documents are masked from each other; padding is no target, and nobody attends to it.

Each epoch is packed as a whole by bins.py, longest first, and its samples are shuffled. Against masked packing, which
cuts a document at the end of every sample, this costs a little padding: `megalong data plan` tells both.
"""

from __future__ import annotations

from functools import lru_cache, partial
from itertools import count
from typing import Any

import numpy as np

from megalong.data.samples.bins import best_fit
from megalong.data.samples.stream import DomainStream

Packed = tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]


class WholeDocuments(DomainStream):
    """A domain whose samples are bins of whole documents; the same arguments and methods as its base."""

    STORED_AS = "samples"  # the name of packed epochs in the index
    ALIKE = True  # whether epochs of the same documents have as many samples

    def __init__(self, *arguments: Any, **named: Any) -> None:
        super().__init__(*arguments, **named)
        self._samples = lru_cache(maxsize=2)(self._indexed_samples)
        self._counts: dict[tuple[int, int], int] = {}

    def _indexed_samples(self, epoch: int, seq_length: int) -> Packed:
        """The samples of an epoch: (document, first token, tokens) of their pieces, and the pieces up to each's end."""
        stored = self._index.load(self.STORED_AS, seq_length, epoch)
        documents, firsts, lengths, ends = stored if stored is not None else self._pack(epoch, seq_length)
        return documents, firsts, lengths, ends

    def _pack(self, epoch: int, seq_length: int) -> Packed:
        order = self.order(epoch)
        documents, firsts, lengths = pieces(order, self.lengths[order], seq_length)
        bin_of, bins = best_fit(lengths, seq_length + 1)
        # A seed of six numbers, apart from those of circles, epochs and blocks.
        random = np.random.RandomState([*self._seed, epoch, seq_length & 0xFFFFFFFF, 0])
        sample_of = random.permutation(bins)[bin_of]
        by_sample = np.argsort(sample_of, kind="stable")
        ends = np.cumsum(np.bincount(sample_of, minlength=bins))
        return documents[by_sample], firsts[by_sample], lengths[by_sample].astype(np.int32), ends

    def _found(self, j: int, seq_length: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """(document, first token, tokens) of each piece in sample j."""
        for epoch in count():
            held = self._count(epoch, seq_length)
            if j < held:
                break
            j -= held
        documents, firsts, lengths, ends = self._samples(epoch, seq_length)
        pieces = slice(int(ends[j - 1]) if j else 0, int(ends[j]))
        return documents[pieces], firsts[pieces], lengths[pieces]

    def _count(self, epoch: int, seq_length: int) -> int:
        """Samples of an epoch; without rules that vary, every epoch has as many."""
        key = (epoch if self.epochs.vary or not self.ALIKE else 0), seq_length
        if key not in self._counts:
            self._counts[key] = len(self._samples(*key)[3])
        return self._counts[key]

    def copy_of_sample(self, j: int, seq_length: int, first: int, out: np.ndarray) -> None:
        """Fill `out` with the tokens of sample j from `first` on, zeros behind its documents."""
        documents, begins, lengths = self._found(j, seq_length)
        ends = np.cumsum(lengths, dtype=np.int64)
        low = np.maximum(first, ends - lengths)  # what each piece gives, counted in the sample
        high = np.maximum(low, np.minimum(first + len(out), ends))
        filled = max(0, min(len(out), int(ends[-1]) - first))
        skipped = low - (ends - lengths)
        some = high > low
        starts = self.dataset.starts_of(documents[some]) + begins[some] + skipped[some]
        self.dataset.gather(starts, (high - low)[some], out[:filled])
        out[filled:] = 0

    def documents_of_sample(self, j: int, seq_length: int) -> np.ndarray:
        """int64, ascending from 0: where documents begin in sample j, and behind the last of them the padding."""
        ends = np.cumsum(self._found(j, seq_length)[2], dtype=np.int64)
        return np.concatenate([np.zeros(1, np.int64), ends[ends <= seq_length]])

    def filled_of_sample(self, j: int, seq_length: int) -> int:
        """Tokens of documents in sample j, at most seq_length + 1."""
        return int(self._found(j, seq_length)[2].sum())

    def cuts_of_sample(self, j: int, seq_length: int) -> tuple[bool, bool]:
        """Whether a document in sample j began in another sample, and whether one goes on in another."""
        documents, firsts, lengths = self._found(j, seq_length)
        return bool(np.any(firsts > 0)), bool(np.any(firsts + lengths < self.lengths[documents]))

    def tokens_of_samples(self, samples: int, seq_length: int) -> int:
        """Tokens of documents in the first `samples` samples, at the mean of the first epoch that has any."""
        epoch = next(epoch for epoch in count() if self._count(epoch, seq_length))
        lengths = self._samples(epoch, seq_length)[2]
        return round(samples * int(lengths.sum()) / self._count(epoch, seq_length))

    def most_repeats(self, samples: int, seq_length: int) -> int:
        """How often the first `samples` samples may show one document: they are drawn from whole epochs."""
        epochs = 0
        while samples > 0:
            samples -= self._count(epochs, seq_length)
            epochs += 1
        return max(int(one.times_before(epochs).max()) for one in self.epochs.classes)

    def prepare(self, first: int, last: int, seq_length: int) -> None:
        """Write the epochs up to sample `last`, where they are not on disk yet."""
        if last > first:
            self._store_classes()
        epoch = 0
        while last > 0:
            self._index.store(partial(self._samples, epoch, seq_length), self.STORED_AS, seq_length, epoch)
            last -= self._count(epoch, seq_length)
            epoch += 1


def pieces(documents: np.ndarray, lengths: np.ndarray, seq_length: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Documents as pieces of at most S + 1 tokens that share one with the next: (document, first token, tokens)."""
    parts = np.maximum(1, -(-(lengths - 1) // seq_length))
    which = np.repeat(np.arange(len(documents)), parts)
    number = np.arange(len(which)) - np.repeat(np.cumsum(parts) - parts, parts)
    firsts = number * seq_length
    return documents[which], firsts, np.minimum(seq_length + 1, lengths[which] - firsts)
