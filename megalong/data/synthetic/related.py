"""Samples of related documents that are joined to one document, so that a model attends across them.

    S = 7     documents  a a a, b b b b, a' a' a', c c c c c c c c c c
    samples   [a a a a' a' a' · ·]  [b b b b · · · ·]  [c c c c c c c c]  [c c c …]

An epoch contains every document once, or as often as `lengths` says. Documents longer than S + 1 tokens are split, as
in best-fit packing; parts of S + 1 tokens stay alone, all others are joined by similarity (sketch.py, joining.py). The
result is one document with any packing: its parts attend to each other and positions continue; separators stay between
them. Each epoch joins other documents, because it starts with another one.

Similarity is computed from the tokens, so no column has to name what belongs together. If one does, such as a
repository, `megalong data preprocess --group-by` joins by it, and `related` then joins similar documents among the
results.
"""

from __future__ import annotations

from functools import partial

import numpy as np

from megalong.data.samples.piece import Piece
from megalong.data.samples.whole_documents import Bin, Packed, WholeDocuments, parts
from megalong.data.synthetic.joining import AT_ONCE, joined
from megalong.data.synthetic.sketch import sketched_spans, sketches


class RelatedDocuments(WholeDocuments):
    """A domain whose samples are joined documents. Arguments and methods are those of its base."""

    STORED_AS = "related"
    FIXED_COUNT = False  # each epoch joins other documents

    def _pack(self, epoch: int) -> Packed:
        seq_length = self.seq_length
        order = self.order(epoch)
        documents, firsts, lengths = parts(order, self.lengths[order], seq_length)
        groups = [np.array([alone]) for alone in np.flatnonzero(lengths > seq_length)]
        rest = np.flatnonzero(lengths <= seq_length)
        for part in np.array_split(rest, max(1, -(-len(rest) // AT_ONCE))):
            found = sketches(len(part), partial(self._sketched, documents[part], firsts[part], lengths[part]))
            groups += [part[members] for members in joined(lengths[part], found, seq_length + 1)]
        # A seed of seven numbers; those of circles, epochs, blocks and best-fit samples have fewer.
        random = np.random.RandomState([*self._seed, epoch, seq_length & 0xFFFFFFFF, 0, 0])
        groups = [groups[number] for number in random.permutation(len(groups))]
        by_sample = np.concatenate(groups)
        ends = np.cumsum([len(group) for group in groups])
        return documents[by_sample], firsts[by_sample], lengths[by_sample].astype(np.int32), ends

    def _sketched(self, documents: np.ndarray, firsts: np.ndarray, lengths: np.ndarray, number: int) -> np.ndarray:
        """The tokens from which the sketch of one part is computed."""
        start = self.dataset.start_of(int(documents[number])) + int(firsts[number])
        parts = [self.dataset.read(start + first, count) for first, count in sketched_spans(int(lengths[number]))]
        return parts[0] if len(parts) == 1 else np.concatenate(parts)

    def _bin(self, documents: np.ndarray, firsts: np.ndarray, lengths: np.ndarray) -> Piece:
        return _Joined(self, documents, firsts, lengths)

    def lengths_by_class(self) -> list[tuple[np.ndarray, float]]:
        """Tokens of the joined documents of the first epoch, and how often an epoch contains them on average."""
        lengths, ends = self._samples(0)[2:]
        tokens = np.diff(np.cumsum(lengths)[ends - 1], prepend=0)
        return [(tokens, self.tokens_per_epoch / max(1, int(tokens.sum())))]


class _Joined(Bin):
    """A bin that is one document."""

    @property
    def starts(self) -> np.ndarray:
        return np.array([0, self.filled] if self.filled <= self.stream.seq_length else [0], np.int64)
