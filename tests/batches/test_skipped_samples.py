"""Leaving samples out, against the plain list of what is left."""

from __future__ import annotations

import random

from megalong.batches.skipped_samples import SkippedSamples


def test_numbers_are_those_of_the_list_without_what_is_left_out() -> None:
    numbers = random.Random(0)
    for _ in range(200):
        places = set(numbers.sample(range(40), numbers.randint(0, 20)))
        skipped_samples = SkippedSamples()
        for part in (sorted(places)[::2], sorted(places)[1::2], sorted(places)[:1]):
            skipped_samples.add_places(part)
        left = [place for place in range(100) if place not in places]
        assert [skipped_samples.place(k) for k in range(60)] == left[:60]
        assert skipped_samples.count == len(places)
        assert SkippedSamples(skipped_samples.ranges).ranges == skipped_samples.ranges
