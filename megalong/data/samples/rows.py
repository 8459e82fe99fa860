"""How the samples of one domain fill rows of S tokens: one sample a row, or several shorter packs side by side.

    S = 8    a a a b b b b c | c               one sample: 8 tokens and the one to predict after them
    s = 4    a a a b | b b b c | ·             two packs of `seq_length: 4`, no token of one sees or predicts the other

ProLong trains 64K packs in rows of 512K this way. Positions start again with every pack and its last token has no
target: one target in s is the price, and tokens stay those of the dataset, each once an epoch. Row j of a domain holds
its samples j·P up to j·P + P, P = S / s, so a row still follows from a number alone.
"""

from __future__ import annotations

import numpy as np

from megalong.data.samples.stream import DomainStream
from megalong.data.samples.whole_documents import WholeDocuments


class Rows:
    """The rows of one domain.

    Args:
        stream: its samples.
        seq_length: tokens S of a row.
        pack_length: tokens s of a pack, which divide S; None: a row is one sample.
    """

    def __init__(self, stream: DomainStream, seq_length: int, pack_length: int | None = None) -> None:
        self.stream, self.seq_length = stream, seq_length
        self.packed = pack_length is not None
        self.pack_length = pack_length or seq_length
        self.packs = seq_length // self.pack_length
        self._asked = inner_length(isinstance(stream, WholeDocuments), seq_length, pack_length)

    def copy(self, j: int, first: int, out: np.ndarray) -> None:
        """Fill `out`, of any type that holds the ids, with the tokens of row j from `first` on."""
        if not self.packed:
            return self.stream.copy_of_sample(j, self._asked, first, out)
        at, size = 0, self.pack_length
        while at < len(out) and first + at < self.seq_length:
            pack, skipped = divmod(first + at, size)
            end = min(len(out), at + size - skipped)
            self.stream.copy_of_sample(j * self.packs + pack, self._asked, skipped, out[at:end])
            at = end
        out[at:] = 0
        return None

    def bounds(self, j: int) -> np.ndarray:
        """int64, ascending from 0: where packs begin, and behind the last of them the token that is padding."""
        return np.arange(0, self.seq_length + 1, self.pack_length) if self.packed else np.zeros(1, np.int64)

    def documents(self, j: int) -> np.ndarray:
        """int64, ascending from 0: where documents, or the rest of one, begin in row j, and where padding does."""
        if not self.packed:
            return self.stream.documents_of_sample(j, self._asked)
        found = [np.array([self.seq_length], np.int64)]
        for first, sample in self._each(j):
            starts = self.stream.documents_of_sample(sample, self._asked)
            found.append(first + starts[starts < self.pack_length])
        return np.unique(np.concatenate(found))

    def filled(self, j: int) -> int:
        """Tokens of row j up to the padding at its end."""
        if not self.packed:
            return self.stream.filled_of_sample(j, self._asked)
        return self.seq_length - self.pack_length + self._held(j * self.packs + self.packs - 1)

    def pieces(self, j: int) -> np.ndarray:
        """int64: tokens of each document, or piece of one, among the first S tokens of row j."""
        if not self.packed:
            starts = self.documents(j)
            end = min(self.filled(j), self.seq_length)
            return np.diff(np.append(starts[starts < end], end))
        found = []
        for _, sample in self._each(j):
            starts, end = self.stream.documents_of_sample(sample, self._asked), self._held(sample)
            found.append(np.diff(np.append(starts[starts < end], end)))
        return np.concatenate(found)

    def held(self, j: int) -> int:
        """Tokens of documents in row j, at most S + 1."""
        if not self.packed:
            return self.filled(j)
        return sum(self._held(sample) for _, sample in self._each(j))

    def paddings(self, j: int) -> list[tuple[int, int]]:
        """(first token, end) of the padding of row j, rising: behind each pack, or behind all; S + 1 tokens a row."""
        if not self.packed:
            spans = [(self.filled(j), self.seq_length + 1)]
        else:
            spans = [(first + self._held(sample), first + self.pack_length) for first, sample in self._each(j)]
            spans[-1] = spans[-1][0], self.seq_length + 1
        return [(first, end) for first, end in spans if first < end]

    def targets(self, j: int) -> np.ndarray | None:
        """bool [S + 1]: the tokens that count when they are predicted; None: all that are documents'."""
        if not self.packed:
            return self.stream.targets_of_sample(j, self._asked)
        found = np.zeros(self.seq_length + 1, bool)
        for first, sample in self._each(j):
            end = self._held(sample)
            own = self.stream.targets_of_sample(sample, self._asked)
            found[first + 1 : first + end] = True if own is None else own[1:end]
        return found

    def planted(self, j: int) -> list[tuple[int, int]]:
        """(first token, end) of what was put into the text of row j."""
        return [
            (first + begin, first + end)
            for first, sample in self._each(j)
            for begin, end in self.stream.planted_in_sample(sample, self._asked)
        ]

    def cuts(self, j: int) -> tuple[bool, ...]:
        """Whether a document is cut at the beginning and at the end of row j, or of each pack in it."""
        return tuple(cut for _, sample in self._each(j) for cut in self.stream.cuts_of_sample(sample, self._asked))

    def tokens(self, rows: int) -> int:
        """Tokens of documents that the first `rows` rows hold."""
        return self.stream.tokens_of_samples(rows * self.packs, self._asked)

    def most_repeats(self, rows: int) -> int:
        """How often the first `rows` rows may show one document."""
        return self.stream.most_repeats(rows * self.packs, self._asked)

    def lengths_by_class(self) -> list[tuple[np.ndarray, float]]:
        """Tokens of the documents that an epoch holds, class by class, with the times it holds them on average."""
        return self.stream.lengths_by_class(self._asked)

    def prepare(self, first: int, last: int) -> None:
        """Write the orders that rows `first` up to `last` need, where they are not on disk yet."""
        self.stream.prepare(first * self.packs, last * self.packs, self._asked)

    def _each(self, j: int) -> list[tuple[int, int]]:
        """(first token in the row, number of the stream's sample) of each pack."""
        return [(pack * self.pack_length, j * self.packs + pack) for pack in range(self.packs)]

    def _held(self, sample: int) -> int:
        return min(self.stream.filled_of_sample(sample, self._asked), self.pack_length)


def inner_length(whole_documents: bool, seq_length: int, pack_length: int | None) -> int:
    """The length that a domain's stream is asked for: bins of whole documents hold one token more than that."""
    if pack_length is None:
        return seq_length
    return pack_length - 1 if whole_documents else pack_length
