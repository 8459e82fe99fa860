"""Best-fit decreasing bin packing: longest item first, each into the fullest bin that has room for it.

    capacity 10, items 6 5 4 4 1    →  6 4 | 5 4 1

It needs at most 11/9 of the minimum number of bins, plus 6/9 (Dósa 2007), and leaves well under 1 % empty on real
lengths. Items of equal length, and bins with equal room, are handled together. The work therefore grows with the number
of different lengths, not of items: ten million short documents take seconds.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from itertools import pairwise

import numpy as np


class _OpenBins:
    """Bins that still have room, by room."""

    def __init__(self) -> None:
        self._rooms: list[int] = []
        self._bins: dict[int, np.ndarray] = {}

    def tightest(self, length: int) -> tuple[int, np.ndarray] | None:
        """Remove and return (room, bins) of the fullest bins with room for `length`; None if no bin has room."""
        place = bisect_left(self._rooms, length)
        if place == len(self._rooms):
            return None
        room = self._rooms.pop(place)
        return room, self._bins.pop(room)

    def add(self, room: int, bins: np.ndarray) -> None:
        """Add bins that have `room` left; full ones are dropped."""
        if room == 0 or len(bins) == 0:
            return
        if room in self._bins:
            self._bins[room] = np.concatenate([self._bins[room], bins])
        else:
            insort(self._rooms, room)
            self._bins[room] = bins


def best_fit(lengths: np.ndarray, capacity: int) -> tuple[np.ndarray, int]:
    """(bin of each item: int64 [items], number of bins).

    Args:
        lengths: integers [items], 1 to `capacity`.
    """
    order = np.argsort(-lengths, kind="stable")
    _, firsts = np.unique(-lengths[order], return_index=True)
    bin_of, count, room_left = np.empty(len(lengths), np.int64), 0, _OpenBins()
    for first, last in pairwise([*firsts.tolist(), len(lengths)]):
        length, items = int(lengths[order[first]]), order[first:last]
        while len(items):
            found = room_left.tightest(length)
            if found is None:
                fresh = -(-len(items) // (capacity // length))
                found = capacity, np.arange(count, count + fresh)
                count += fresh
            room, bins = found
            each = room // length
            taken = min(len(items), each * len(bins))
            whole, rest = divmod(taken, each)
            bin_of[items[:taken]] = np.repeat(bins[: whole + 1], each)[:taken]
            room_left.add(room - each * length, bins[:whole])
            if rest:
                room_left.add(room - rest * length, bins[whole : whole + 1])
            room_left.add(room, bins[whole + bool(rest) :])
            items = items[taken:]
    return bin_of, count
