"""The sample type that all sources return: packed documents, conversations, synthetic texts."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np


class StoredTokens:
    """Tokens of a sample that are still on disk. Only what is sliced or copied is read.

    Args:
        length: number of tokens.
        read: called with (first, out); fills `out` with the tokens from `first` on.
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
        """Fill `out`, of any type that fits the IDs, with the tokens from `first` on."""
        self._read(first, out)


@dataclass(frozen=True)
class Sample:
    """S + 1 tokens: the first S are inputs, the last S are labels.

    Attributes:
        tokens: int64 [S + 1], or an object that reads them lazily.
        documents: int64, ascending from 0: where each masked span begins (a document or the rest of one, a pack,
            padding). Only 0 if all tokens attend to each other.
        filled: number of tokens before the padding at the end, at most S + 1.
        positions: int64 [S]: positions of the inputs; None: counted from the start of the document (masked) or of the
            sample (naive).
        targets: bool [S + 1]: the tokens that are targets, never the first; None: all.
        weights: float32 [2, S + 1]: for each token, the weight of its loss (0 if it is not a target), and its share of
            the number that the sum is divided by. None: the loss is a mean over tokens.
    """

    tokens: np.ndarray | StoredTokens
    documents: np.ndarray
    filled: int
    positions: np.ndarray | None = None
    targets: np.ndarray | None = None
    weights: np.ndarray | None = None

    def copy_tokens(self, first: int, out: np.ndarray) -> None:
        """Fill `out`, of any type that fits the IDs, with the tokens from `first` on."""
        if isinstance(self.tokens, StoredTokens):
            self.tokens.copy_to(first, out)
        else:
            out[:] = self.tokens[first : first + len(out)]


class SampleSource(Protocol):
    """Samples that any rank can compute from their number alone."""

    seq_length: int

    def read(self, k: int) -> Sample:
        """Sample k >= 0."""
        ...

    def describe(self, samples: int) -> Sequence[object]:
        """What the first `samples` samples consist of, one line for each source."""
        ...

    def prepare(self, first: int, last: int) -> None:
        """Prepare what samples `first` to `last` - 1 need, once for all ranks."""
        ...
