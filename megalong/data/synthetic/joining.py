"""Which texts are joined to one long document: each is followed by the one most like what stands before it.

Greedy nearest neighbour, as in "In-Context Pretraining" (Shi et al., 2023), on the sketches of sketch.py. A document is
begun with the first text that is left; then, as long as one fits into the room that is left, the text is added whose
dot product with the sum of those already in it is highest. Every text comes once.

    texts     a1 b1 a2 c1 b2 a3      room for three:   a1 a2 a3 | b1 b2 c1

Time and memory are bounded by comparing texts in blocks of at most BLOCK, whose dot products are one matrix of 64 MB.
Where there are more texts, blocks are made by halving: a direction between two texts that are far apart, half of the
texts to either end of it, and so on, so that what belongs together mostly stays together. The caller hands
over at most AT_ONCE texts at once, whose sketches are 134 MB.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

BLOCK = 4096
AT_ONCE = 2**17


def joined(lengths: np.ndarray, found: np.ndarray, capacity: int) -> Iterator[np.ndarray]:
    """The texts of each document, int64, in the order in which it holds them.

    Args:
        lengths: whole numbers [texts], none above `capacity`, in the order in which documents are begun.
        found: int16 [texts, SIZE], their sketches.
        capacity: tokens of a document at most.
    """
    for members in _blocks(np.arange(len(lengths)), found):
        yield from _joined_in_block(members, lengths[members], found[members], capacity)


def _blocks(members: np.ndarray, found: np.ndarray) -> Iterator[np.ndarray]:
    """`members`, whole numbers in rising order, as blocks of at most BLOCK that resemble each other, each rising."""
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
    """float32 [members]: dot products, which are whole numbers and exact; BLOCK texts are widened at a time."""
    starts = range(0, len(members), BLOCK)
    return np.concatenate([found[members[at : at + BLOCK]].astype(np.float32) @ with_one for at in starts])


def _joined_in_block(
    members: np.ndarray, lengths: np.ndarray, found: np.ndarray, capacity: int
) -> Iterator[np.ndarray]:
    wide = found.astype(np.float32)
    products = wide @ wide.T
    left = np.ones(len(members), bool)
    for begun in range(len(members)):
        if not left[begun]:
            continue
        chosen, room, likeness = [begun], capacity - int(lengths[begun]), products[begun].astype(np.float64)
        left[begun] = False
        while True:
            fits = np.flatnonzero(left & (lengths <= room))
            if len(fits) == 0:
                break
            best = int(fits[np.argmax(likeness[fits])])
            chosen.append(best)
            left[best] = False
            room -= int(lengths[best])
            likeness += products[best]
        yield members[chosen]
