"""Histogram of document lengths by doublings: [1, 2), [2, 4), [4, 8) …

Long-context training needs the few long documents. A mean hides them; doublings show them. Each bucket counts documents
and tokens. Empty documents have no bucket. Lengths are added incrementally, because a corpus may have more documents
than fit into memory.
"""

from typing import Any

import numpy as np

Bucket = dict[str, int]
DOUBLINGS = 63


class LengthHistogram:
    """Counts by doublings of all lengths added so far; `empty` counts empty documents.

    Args:
        state: continue from this state of another histogram.
    """

    def __init__(self, state: dict[str, Any] | None = None) -> None:
        state = state or {"documents": [0] * DOUBLINGS, "tokens": [0] * DOUBLINGS, "empty": 0}
        self._documents = np.array(state["documents"], np.int64)
        self._tokens = np.array(state["tokens"], np.int64)
        self.empty: int = state["empty"]

    def state(self) -> dict[str, Any]:
        """All counts, as JSON values."""
        return {"documents": self._documents.tolist(), "tokens": self._tokens.tolist(), "empty": self.empty}

    def add(self, lengths: np.ndarray) -> None:
        """Count `lengths`: integers [documents]."""
        lengths = np.asarray(lengths, np.int64)
        self.empty += int((lengths == 0).sum())
        lengths = lengths[lengths > 0]
        doubling = np.frexp(lengths.astype(np.float64))[1] - 1  # floor(log2), exact below 2^53
        self._documents += np.bincount(doubling, minlength=DOUBLINGS)
        np.add.at(self._tokens, doubling, lengths)

    def buckets(self) -> list[Bucket]:
        """Buckets from the shortest to the longest length that occurs, empty ones between them included.

        Each is {"from": 2^k, "below": 2^(k+1), "documents": …, "tokens": …}.
        """
        used = np.flatnonzero(self._documents)
        return [
            {
                "from": 2**k,
                "below": 2 ** (k + 1),
                "documents": int(self._documents[k]),
                "tokens": int(self._tokens[k]),
            }
            for k in (range(int(used[0]), int(used[-1]) + 1) if len(used) else ())
        ]


def length_histogram(lengths: np.ndarray) -> list[Bucket]:
    """The buckets of `lengths`: integers [documents]."""
    histogram = LengthHistogram()
    histogram.add(lengths)
    return histogram.buckets()
