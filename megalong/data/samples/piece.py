"""The piece: one sample (or pack) of one domain, as its stream returns it."""

from __future__ import annotations

from abc import ABC, abstractmethod

import numpy as np

from megalong.data.samples.sample import StoredTokens

Span = tuple[int, int]  # (first token, end)


class Piece(ABC):
    """S + 1 tokens: documents, then padding. Everything is computed lazily."""

    @property
    @abstractmethod
    def tokens(self) -> StoredTokens:
        """All S + 1 tokens; padding is 0."""

    @property
    @abstractmethod
    def starts(self) -> np.ndarray:
        """int64, ascending from 0: where documents (or the rest of one) and padding begin."""

    @property
    @abstractmethod
    def filled(self) -> int:
        """Number of tokens of documents, at most S + 1."""

    @property
    @abstractmethod
    def cut(self) -> tuple[bool, bool]:
        """Whether a document began in another piece, and whether one continues in another."""

    @property
    def targets(self) -> np.ndarray | None:
        """bool [S + 1]: the tokens that are targets; None: all tokens of documents."""
        return None

    @property
    def planted(self) -> list[Span]:
        """Where texts were inserted."""
        return []
