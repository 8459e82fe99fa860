"""Rows of S tokens from the pieces of one domain: one piece per row, or several shorter packs side by side.

    S = 8    a a a b b b b c | c               one piece: 8 tokens and the one to predict after them
    s = 4    a a a b | b b b c | ·             two packs of `seq_length: 4`, masked from each other

ProLong trains 64K packs in rows of 512K this way. Positions restart with every pack, and its last token has no target.
That costs one target in s, and every token of the dataset still occurs once per epoch. Row j of a domain contains its
pieces j·P up to j·P + P, with P = S / s, so a row still follows from its number alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from megalong.data.samples.piece import Piece, Span
from megalong.data.samples.sample import StoredTokens
from megalong.data.samples.stream import DomainStream


@dataclass(frozen=True)
class Row:
    """S + 1 tokens of one domain. Everything is computed lazily.

    Attributes:
        seq_length: tokens S.
        pack_length: tokens s of a pack, a divisor of S; None: the row is one piece of S + 1 tokens.
        pieces: the one piece, or one for each pack.
    """

    seq_length: int
    pack_length: int | None
    pieces: Sequence[Piece]

    @property
    def tokens(self) -> StoredTokens:
        """All S + 1 tokens; padding is 0. After packs the last token is padding."""
        return StoredTokens(self.seq_length + 1, self._copy) if self.pack_length else self.pieces[0].tokens

    @property
    def bounds(self) -> np.ndarray:
        """int64, ascending from 0: where packs begin, and the padding token after the last pack."""
        return np.arange(0, self.seq_length + 1, self.pack_length) if self.pack_length else np.zeros(1, np.int64)

    @property
    def starts(self) -> np.ndarray:
        """int64, ascending from 0: where documents (or the rest of one) and padding begin."""
        if not self.pack_length:
            return self.pieces[0].starts
        found = [np.array([self.seq_length], np.int64)]
        for first, piece in self._placed():
            starts = piece.starts
            found.append(first + starts[starts < self.pack_length])
        return np.unique(np.concatenate(found))

    @property
    def filled(self) -> int:
        """Number of tokens before the padding at the end."""
        return (len(self.pieces) - 1) * self._width + self._filled(self.pieces[-1])

    @property
    def document_tokens(self) -> int:
        """Number of tokens that are not padding."""
        return sum(map(self._filled, self.pieces))

    @property
    def lengths(self) -> np.ndarray:
        """int64: tokens of each document (or part of one) among the first S tokens."""
        found = []
        for piece in self.pieces:
            starts, end = piece.starts, min(piece.filled, self.pack_length or self.seq_length)
            found.append(np.diff(np.append(starts[starts < end], end)))
        return np.concatenate(found)

    @property
    def paddings(self) -> list[Span]:
        """Where padding is in the S + 1 tokens, ascending: after each pack, or at the end."""
        spans = [(first + self._filled(piece), first + self._width) for first, piece in self._placed()]
        spans[-1] = spans[-1][0], self.seq_length + 1
        return [(first, end) for first, end in spans if first < end]

    @property
    def targets(self) -> np.ndarray | None:
        """bool [S + 1]: the tokens that are targets; None: all tokens of documents."""
        if not self.pack_length:
            return self.pieces[0].targets
        found = np.zeros(self.seq_length + 1, bool)
        for first, piece in self._placed():
            end, own = self._filled(piece), piece.targets
            found[first + 1 : first + end] = True if own is None else own[1:end]
        return found

    @property
    def planted(self) -> list[Span]:
        """Where texts were inserted: notes, and question with answer."""
        return [(first + begin, first + end) for first, piece in self._placed() for begin, end in piece.planted]

    @property
    def cuts(self) -> tuple[bool, ...]:
        """Whether a document is cut at the beginning and at the end of the row, or of each pack in it."""
        return tuple(cut for piece in self.pieces for cut in piece.cut)

    @property
    def _width(self) -> int:
        return self.pack_length or self.seq_length + 1

    def _filled(self, piece: Piece) -> int:
        return min(piece.filled, self._width)

    def _placed(self) -> list[tuple[int, Piece]]:
        """(first token in the row, piece) of each piece."""
        return [(number * self._width, piece) for number, piece in enumerate(self.pieces)]

    def _copy(self, first: int, out: np.ndarray) -> None:
        """Fill `out` with the tokens of packs from `first` on."""
        at = 0
        while at < len(out) and first + at < self.seq_length:
            number, skipped = divmod(first + at, self._width)
            end = min(len(out), at + self._width - skipped)
            self.pieces[number].tokens.copy_to(skipped, out[at:end])
            at = end
        out[at:] = 0


class Rows:
    """The rows of one domain.

    Args:
        stream: the domain's pieces, of S + 1 tokens; for packs, of the length that `inner_length` gives.
        seq_length, pack_length: see `Row`.
    """

    def __init__(self, stream: DomainStream, seq_length: int, pack_length: int | None = None) -> None:
        self.stream, self._seq_length, self._pack_length = stream, seq_length, pack_length
        self._packs = seq_length // (pack_length or seq_length)

    def row(self, j: int) -> Row:
        """Row j."""
        pieces = [self.stream.piece(j * self._packs + pack) for pack in range(self._packs)]
        return Row(self._seq_length, self._pack_length, pieces)

    def tokens(self, rows: int) -> int:
        """Tokens of documents in the first `rows` rows."""
        return self.stream.tokens_of_pieces(rows * self._packs)

    def most_repeats(self, rows: int) -> int:
        """How often one document may occur in the first `rows` rows."""
        return self.stream.most_repeats(rows * self._packs)

    def prepare(self, first: int, last: int) -> None:
        """Write the orders that rows `first` up to `last` need, if they are not on disk yet."""
        self.stream.prepare(first * self._packs, last * self._packs)


def inner_length(whole_documents: bool, seq_length: int, pack_length: int | None) -> int:
    """`seq_length` of a domain's stream; its pieces have one token more. A bin of whole documents is exactly a pack."""
    if pack_length is None:
        return seq_length
    return pack_length - 1 if whole_documents else pack_length
