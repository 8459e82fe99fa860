"""Lengths by doublings against whole-number arithmetic."""

import numpy as np

from megalong.data.lengths import length_histogram


def test_buckets_are_doublings_with_their_documents_and_tokens() -> None:
    lengths = [0, 4, 5, 7, 8, 31, 32, 33, 2**31 - 1]
    expected = {
        k: [length for length in lengths if length.bit_length() == k + 1] for k in range(2, 31)
    }  # 4 is the shortest: no bucket below it
    assert length_histogram(np.array(lengths)) == [
        {"from": 2**k, "below": 2 ** (k + 1), "documents": len(inside), "tokens": sum(inside)}
        for k, inside in expected.items()
    ]
    assert length_histogram(np.array([0, 0])) == []
