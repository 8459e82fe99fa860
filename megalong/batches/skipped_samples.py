"""Samples that a run skips because it diverged on them.

The order of samples is fixed; a run trains on that order without the skipped ranges. Its position counts the samples
that it trained on, so skipping later samples moves nothing before them:

    order    0 1 2 3 4 5 6 7 8 9        skipped: [4, 6)
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
        """The skipped ranges."""
        return list(self._ranges)

    @property
    def count(self) -> int:
        """Number of skipped samples."""
        return sum(last - first for first, last in self._ranges)

    def place(self, number: int) -> int:
        """Position in the order of the `number`-th sample that is not skipped."""
        for first, last in self._ranges:
            if number < first:
                break
            number += last - first
        return number

    def add_places(self, places: Iterable[int]) -> None:
        """Skip the samples at these positions of the order."""
        taken = sorted({*places, *(place for first, last in self._ranges for place in range(first, last))})
        self._ranges = []
        for place in taken:
            if self._ranges and self._ranges[-1][1] == place:
                self._ranges[-1] = (self._ranges[-1][0], place + 1)
            else:
                self._ranges.append((place, place + 1))


def remaining(opened: Callable[[], SampleSource], skipped_samples: SkippedSamples) -> Remaining:
    """Open a source and return its `Remaining`; other processes can call this too."""
    return Remaining(opened(), skipped_samples)


class Remaining:
    """A source without its skipped samples; otherwise the same as the source."""

    def __init__(self, source: SampleSource, skipped_samples: SkippedSamples) -> None:
        self.source, self.skipped_samples = source, skipped_samples
        self.seq_length = source.seq_length

    def read(self, k: int) -> Sample:
        """The k-th sample that is not skipped."""
        return self.source.read(self.skipped_samples.place(k))

    def describe(self, samples: int) -> Sequence[object]:
        """Describe the first `samples` samples, including skipped ones."""
        return self.source.describe(samples)

    def prepare(self, first: int, last: int) -> None:
        """Prepare positions `first` to `last` of the source, including skipped ones."""
        self.source.prepare(first, last)

    def __getattr__(self, name: str) -> Any:
        if name == "source":  # pickle asks for it before it is set
            raise AttributeError(name)
        return getattr(self.source, name)
