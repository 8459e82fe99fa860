"""How the pieces of one domain fill rows of S tokens: one piece a row, or several shorter packs side by side.

    S = 8    a a a b b b b c | c               one piece: 8 tokens and the one to predict after them
    s = 4    a a a b | b b b c | ·             two packs of `seq_length: 4`, no token of one sees or predicts the other

ProLong trains 64K packs in rows of 512K this way. Positions start again with every pack and its last token has no
target: one target in s is the price, and tokens stay those of the dataset, each once an epoch. Row j of a domain holds
its pieces j·P up to j·P + P, P = S / s, so a row still follows from a number alone.
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
    """S + 1 tokens of one domain. What is not in `pieces` is computed when it is asked for.

    Attributes:
        seq_length: tokens S.
        pack_length: tokens s of a pack, which divide S; None: the row is one piece of S + 1 tokens.
        pieces: the only one, or of each pack.
    """

    seq_length: int
    pack_length: int | None
    pieces: Sequence[Piece]

    @property
    def tokens(self) -> StoredTokens:
        """All S + 1, zeros for padding; behind packs the last one is padding."""
        return StoredTokens(self.seq_length + 1, self._copy) if self.pack_length else self.pieces[0].tokens

    @property
    def bounds(self) -> np.ndarray:
        """int64, ascending from 0: where packs begin, and behind the last of them the token that is padding."""
        return np.arange(0, self.seq_length + 1, self.pack_length) if self.pack_length else np.zeros(1, np.int64)

    @property
    def starts(self) -> np.ndarray:
        """int64, ascending from 0: where documents, or the rest of one, begin, and where padding does."""
        if not self.pack_length:
            return self.pieces[0].starts
        found = [np.array([self.seq_length], np.int64)]
        for first, piece in self._placed():
            starts = piece.starts
            found.append(first + starts[starts < self.pack_length])
        return np.unique(np.concatenate(found))

    @property
    def filled(self) -> int:
        """Tokens up to the padding at the end."""
        return (len(self.pieces) - 1) * self._width + self._held(self.pieces[-1])

    @property
    def held(self) -> int:
        """Tokens of documents, wherever padding is."""
        return sum(map(self._held, self.pieces))

    @property
    def lengths(self) -> np.ndarray:
        """int64: tokens of each document, or part of one, among the first S tokens."""
        found = []
        for piece in self.pieces:
            starts, end = piece.starts, min(piece.filled, self.pack_length or self.seq_length)
            found.append(np.diff(np.append(starts[starts < end], end)))
        return np.concatenate(found)

    @property
    def paddings(self) -> list[Span]:
        """Where padding is, ascending: behind each pack, or behind all; S + 1 tokens a row."""
        spans = [(first + self._held(piece), first + self._width) for first, piece in self._placed()]
        spans[-1] = spans[-1][0], self.seq_length + 1
        return [(first, end) for first, end in spans if first < end]

    @property
    def targets(self) -> np.ndarray | None:
        """bool [S + 1]: the tokens that count when they are predicted; None: all that are documents'."""
        if not self.pack_length:
            return self.pieces[0].targets
        found = np.zeros(self.seq_length + 1, bool)
        for first, piece in self._placed():
            end, own = self._held(piece), piece.targets
            found[first + 1 : first + end] = True if own is None else own[1:end]
        return found

    @property
    def planted(self) -> list[Span]:
        """What was put into the text: notes, and question with answer."""
        return [(first + begin, first + end) for first, piece in self._placed() for begin, end in piece.planted]

    @property
    def cuts(self) -> tuple[bool, ...]:
        """Whether a document is cut at the beginning and at the end of the row, or of each pack in it."""
        return tuple(cut for piece in self.pieces for cut in piece.cut)

    @property
    def _width(self) -> int:
        return self.pack_length or self.seq_length + 1

    def _held(self, piece: Piece) -> int:
        return min(piece.filled, self._width)

    def _placed(self) -> list[tuple[int, Piece]]:
        """(first token in the row, piece) of each."""
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
        stream: its pieces, S + 1 tokens long; for packs, `inner_length` says how long.
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
        """Tokens of documents that the first `rows` rows hold."""
        return self.stream.tokens_of_pieces(rows * self._packs)

    def most_repeats(self, rows: int) -> int:
        """How often the first `rows` rows may show one document."""
        return self.stream.most_repeats(rows * self._packs)

    def prepare(self, first: int, last: int) -> None:
        """Write the orders that rows `first` up to `last` need, where they are not on disk yet."""
        self.stream.prepare(first * self._packs, last * self._packs)


def inner_length(whole_documents: bool, seq_length: int, pack_length: int | None) -> int:
    """`seq_length` of a domain's stream. A piece has one token more: in bins of whole documents that is the pack's."""
    if pack_length is None:
        return seq_length
    return pack_length - 1 if whole_documents else pack_length
