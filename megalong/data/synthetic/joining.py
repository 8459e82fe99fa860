"""Groups texts into long documents: each text is followed by the one most similar to those before it.

Greedy nearest neighbour, as in "In-Context Pretraining" (Shi et al., 2023), on the sketches of sketch.py. A document
starts with the first text that is left. While a text fits into the remaining room, the one is added whose dot product
with the sum of those already in the document is highest. Every text is used once.

    texts     a1 b1 a2 c1 b2 a3      room for three:   a1 a2 a3 | b1 b2 c1

Texts are compared in blocks of at most BLOCK, whose dot products are one matrix of 64 MB; this bounds time and memory.
More texts are split into blocks by repeated halving along the direction between two texts that are far apart, so that
related texts mostly stay together. The caller passes at most AT_ONCE texts at once, whose sketches are 134 MB.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

BLOCK = 4096
AT_ONCE = 2**17


def joined(lengths: np.ndarray, found: np.ndarray, capacity: int) -> Iterator[np.ndarray]:
    """The texts of each document, in order: int64.

    Args:
        lengths: integers [texts], none above `capacity`. Documents start with texts in this order.
        found: int16 [texts, SIZE], their sketches.
        capacity: maximum tokens of a document.
    """
    for members in _blocks(np.arange(len(lengths)), found):
        yield from _joined_in_block(members, lengths[members], found[members], capacity)


def _blocks(members: np.ndarray, found: np.ndarray) -> Iterator[np.ndarray]:
    """Split `members` (integers, ascending) into blocks of at most BLOCK similar texts, each ascending."""
    if len(members) <= BLOCK:
        yield members
        return
    first = found[members[0]].astype(np.float32)
    one = found[members[np.argmin(_products(members, found, first))]].astype(np.float32)
    other = found[members[np.argmin(_products(members, found, one))]].astype(np.float32)
    order = np.argsort(_products(members, found, one) - _products(members, found, other), kind="stable")
    half = len(members) // 2
    for part in (order[:half], order[half:]):
        yield from _blocks(members[np.sort(part)], found)


def _products(members: np.ndarray, found: np.ndarray, with_one: np.ndarray) -> np.ndarray:
    """float32 [members]: dot products, which are exact integers; BLOCK texts are converted to float32 at a time."""
    starts = range(0, len(members), BLOCK)
    return np.concatenate([found[members[at : at + BLOCK]].astype(np.float32) @ with_one for at in starts])


def _joined_in_block(
    members: np.ndarray, lengths: np.ndarray, found: np.ndarray, capacity: int
) -> Iterator[np.ndarray]:
    wide = found.astype(np.float32)
    products = wide @ wide.T
    left = np.ones(len(members), bool)
    for first in range(len(members)):
        if not left[first]:
            continue
        chosen, room, similarity = [first], capacity - int(lengths[first]), products[first].astype(np.float64)
        left[first] = False
        while True:
            fits = np.flatnonzero(left & (lengths <= room))
            if len(fits) == 0:
                break
            best = int(fits[np.argmax(similarity[fits])])
            chosen.append(best)
            left[best] = False
            room -= int(lengths[best])
            similarity += products[best]
        yield members[chosen]
