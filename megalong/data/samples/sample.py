"""The sample type that every source of samples returns: packed documents, conversations, synthetic texts."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np


class StoredTokens:
    """Tokens of a sample that still lie on disk: what is sliced or copied is read, nothing else ever is.

    Args:
        length: how many there are.
        read: called with (first, out), fills `out` with the tokens from `first` on.
    """

    def __init__(self, length: int, read: Callable[[int, np.ndarray], None]) -> None:
        self._length, self._read = length, read

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, span: slice | np.ndarray) -> np.ndarray:
        if not isinstance(span, slice):
            return np.asarray(self[:][span])
        first, stop, step = span.indices(self._length)
        assert step == 1
        out = np.empty(max(0, stop - first), np.int64)
        self._read(first, out)
        return out

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        return self[:] if dtype is None else self[:].astype(dtype)

    def copy_to(self, first: int, out: np.ndarray) -> None:
        """Fill `out`, of any type that holds the ids, with the tokens from `first` on."""
        self._read(first, out)


@dataclass(frozen=True)
class Sample:
    """S + 1 tokens: the first S are read, the last S are to be predicted.

    Attributes:
        tokens: int64 [S + 1], or what reads them when they are asked for.
        documents: int64, ascending from 0: where what is kept apart begins: a document or the rest of one, a pack,
            padding; 0 alone where all tokens see each other.
        filled: tokens that are documents', at most S + 1; padding follows.
        positions: int64 [S]: positions of the tokens read, where they are not places in the document (masked) or in the
            sample (naive).
        targets: bool [S + 1]: the tokens that count when they are predicted, the first never being one; None: all.
        weights: float32 [2, S + 1], where the loss is no mean over tokens: what the loss of each token weighs when it
            is predicted, 0 where it is no target, and how much it adds to the number that the sum is divided by.
    """

    tokens: np.ndarray | StoredTokens
    documents: np.ndarray
    filled: int
    positions: np.ndarray | None = None
    targets: np.ndarray | None = None
    weights: np.ndarray | None = None

    def copy_tokens(self, first: int, out: np.ndarray) -> None:
        """Fill `out`, of any type that holds the ids, with the tokens from `first` on."""
        if isinstance(self.tokens, StoredTokens):
            self.tokens.copy_to(first, out)
        else:
            out[:] = self.tokens[first : first + len(out)]


class SampleSource(Protocol):
    """Samples that any rank computes from a number alone."""

    seq_length: int

    def read(self, k: int) -> Sample:
        """Sample k >= 0."""
        ...

    def describe(self, samples: int) -> Sequence[object]:
        """What the first `samples` samples are made of, a line for each part."""
        ...

    def prepare(self, first: int, last: int) -> None:
        """Make what samples `first` to `last` - 1 need, once for all ranks."""
        ...
