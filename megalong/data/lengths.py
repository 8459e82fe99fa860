"""How long documents are, counted by doublings: [1, 2), [2, 4), [4, 8) …

Long-context training lives on the few long documents; a mean hides them, doublings show them: for each bucket the
number of documents and of tokens. Empty documents have no bucket.
"""

import numpy as np

Bucket = dict[str, int]


def length_histogram(lengths: np.ndarray) -> list[Bucket]:
    """`lengths` (whole numbers [documents]) → buckets from the shortest to the longest that occur, gaps included.

    Each is {"from": 2^k, "below": 2^(k+1), "documents": …, "tokens": …}.
    """
    lengths = np.asarray(lengths, np.int64)
    lengths = lengths[lengths > 0]
    if len(lengths) == 0:
        return []
    doubling = np.frexp(lengths.astype(np.float64))[1] - 1  # floor(log2), exact below 2^53
    documents = np.bincount(doubling)
    tokens = np.zeros(len(documents), np.int64)
    np.add.at(tokens, doubling, lengths)
    return [
        {"from": 2**k, "below": 2 ** (k + 1), "documents": int(documents[k]), "tokens": int(tokens[k])}
        for k in range(int(doubling.min()), len(documents))
    ]
