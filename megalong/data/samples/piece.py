"""A sample of one domain, as its stream gives it."""

from __future__ import annotations

from abc import ABC, abstractmethod

import numpy as np

from megalong.data.samples.sample import StoredTokens

Span = tuple[int, int]  # (first token, end)


class Piece(ABC):
    """S + 1 tokens: documents, then padding. Everything is computed when it is asked for."""

    @property
    @abstractmethod
    def tokens(self) -> StoredTokens:
        """All S + 1, zeros for padding."""

    @property
    @abstractmethod
    def starts(self) -> np.ndarray:
        """int64, ascending from 0: where documents, or the rest of one, begin, and where padding does."""

    @property
    @abstractmethod
    def filled(self) -> int:
        """Tokens of documents, at most S + 1."""

    @property
    @abstractmethod
    def cut(self) -> tuple[bool, bool]:
        """Whether a document in it began in another piece, and whether one goes on in another."""

    @property
    def targets(self) -> np.ndarray | None:
        """bool [S + 1]: the tokens that count when they are predicted; None: all tokens of documents."""
        return None

    @property
    def planted(self) -> list[Span]:
        """Texts that were inserted into it."""
        return []
