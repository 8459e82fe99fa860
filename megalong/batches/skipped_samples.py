"""Samples that are left out of the order, because a run went wrong on them.

The order of samples is fixed; what a run trains on is that order without the ranges left out. Its position counts the
samples trained on, so leaving some out later on moves nothing that came before:

    order    0 1 2 3 4 5 6 7 8 9        left out: [4, 6)
    number   0 1 2 3     4 5 6 7
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

from megalong.data.samples.sample import Sample, SampleSource


class SkippedSamples:
    """Ranges [first, last) of the order, disjoint and ascending."""

    def __init__(self, ranges: Iterable[tuple[int, int]] = ()) -> None:
        self._ranges: list[tuple[int, int]] = []
        for first, last in ranges:
            self.add_places(range(first, last))

    @property
    def ranges(self) -> list[tuple[int, int]]:
        """What is left out."""
        return list(self._ranges)

    @property
    def count(self) -> int:
        """How many samples are left out."""
        return sum(last - first for first, last in self._ranges)

    def place(self, number: int) -> int:
        """Where the `number`-th sample that is not left out stands in the order."""
        for first, last in self._ranges:
            if number < first:
                break
            number += last - first
        return number

    def add_places(self, places: Iterable[int]) -> None:
        """Leave these places of the order out."""
        taken = sorted({*places, *(place for first, last in self._ranges for place in range(first, last))})
        self._ranges = []
        for place in taken:
            if self._ranges and self._ranges[-1][1] == place:
                self._ranges[-1] = (self._ranges[-1][0], place + 1)
            else:
                self._ranges.append((place, place + 1))


def remaining(opened: Callable[[], SampleSource], skipped_samples: SkippedSamples) -> Remaining:
    """`Remaining` of a source that is opened here: what another process can be told to do."""
    return Remaining(opened(), skipped_samples)


class Remaining:
    """A source without the samples left out; all else is the source's own."""

    def __init__(self, source: SampleSource, skipped_samples: SkippedSamples) -> None:
        self.source, self.skipped_samples = source, skipped_samples
        self.seq_length = source.seq_length

    def read(self, k: int) -> Sample:
        """The k-th sample that is not left out."""
        return self.source.read(self.skipped_samples.place(k))

    def describe(self, samples: int) -> Sequence[object]:
        """What the first `samples` samples are made of, those left out included."""
        return self.source.describe(samples)

    def prepare(self, first: int, last: int) -> None:
        """Places of the source, as the caller counts them."""
        self.source.prepare(first, last)

    def __getattr__(self, name: str) -> Any:
        if name == "source":  # asked for by pickle before there is one
            raise AttributeError(name)
        return getattr(self.source, name)
