"""A sketch of a document: 512 small integers, computed from its tokens, with which related documents are found.

Hashed TF-IDF (Weinberger et al., 2009, "Feature Hashing for Large Scale Multitask Learning"). Each distinct token of a
document has a weight, however often it occurs: the fewer documents contain it, the higher; 0 if half of them do or only
one. The token's hash says to which of the 512 numbers its weight is added, and with which sign. Sketches are scaled to
the same norm, so a dot product is a cosine similarity. Of 1,541 source files of 15 packages, 86 % have their nearest
neighbour in their own package; weighing pairs of tokens as well made this worse.

Every rank must find the same neighbours on any machine, and sums of floats depend on the order of summation. All
numbers are therefore integers, small enough that float32 products and sums are exact in any order: |sketch|² is about
10^6, and a dot product stays below 2^24.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np

SIZE = 512
LENGTH = 1000  # norm of a sketch; LENGTH² must stay below 2^24
KINDS = 2**18  # hash values of a token
READ = 2048  # tokens read of a document: half from its beginning, half from its middle

Read = Callable[[int], np.ndarray]


def sketches(count: int, read: Read) -> np.ndarray:
    """int16 [count, SIZE]: the sketch of each text.

    Args:
        read: returns the tokens of text n, as `sketched_spans` chooses them; called twice for each.
    """
    document_counts = np.zeros(KINDS, np.int64)
    for number in range(count):
        document_counts[_kinds(read(number))] += 1
    weights = _weights(document_counts, count)
    places, signs = _places_and_signs()
    found = np.zeros((count, SIZE), np.int16)
    for number in range(count):
        kinds = _kinds(read(number))
        sums = np.bincount(places[kinds], weights[kinds] * signs[kinds], SIZE)  # integers: exact
        norm = np.sqrt(np.square(sums.astype(np.int64)).sum())
        if norm > 0:
            found[number] = np.rint(sums * (LENGTH / norm))
    return found


def sketched_spans(length: int) -> Iterator[tuple[int, int]]:
    """(first token, tokens) of the parts of a text of `length` tokens from which its sketch is computed."""
    if length <= READ:
        yield 0, length
        return
    yield 0, READ // 2
    yield length // 2, min(READ // 2, length - length // 2)


def _kinds(tokens: np.ndarray) -> np.ndarray:
    """The distinct hash values of `tokens`: int64, ascending."""
    return np.unique((_mixed(tokens.astype(np.uint64)) >> np.uint64(64 - 18)).astype(np.int64))


def _mixed(values: np.ndarray) -> np.ndarray:
    """uint64 → uint64, where each output bit depends on all input bits (the finalizer of splitmix64)."""
    values = (values + np.uint64(0x9E3779B97F4A7C15)) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))


def _weights(document_counts: np.ndarray, count: int) -> np.ndarray:
    """int64 [KINDS]: 4·√(log2(documents / documents that contain the kind) - 1), rounded down, at least 0.

    A kind that only one document contains has weight 0: it cannot make two documents similar.
    """
    shares = np.log2(max(1, count)) - np.log2(np.maximum(document_counts, 1)) - 1
    # The offset keeps exact integers from depending on the last digit of a machine's logarithm.
    weights = np.floor(4 * np.sqrt(np.maximum(0, shares)) + 1e-6).astype(np.int64)
    return np.where(document_counts > 1, weights, 0)


def _places_and_signs() -> tuple[np.ndarray, np.ndarray]:
    """For each kind its place in a sketch and its sign."""
    mixed = _mixed(np.arange(KINDS, dtype=np.uint64))
    return (mixed % np.uint64(SIZE)).astype(np.int64), np.where(mixed >> np.uint64(63), 1, -1)
