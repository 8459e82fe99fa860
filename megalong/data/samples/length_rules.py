"""Length rules divide a domain's documents into classes, each with the number of times an epoch contains it.

    lengths: {below: 4096, keep: 0.1, above: 8192, repeat: 2}       short × 0.1, middle × 1, long × 2
    lengths: {above: 8192, share: 0.6}                              long × r, such that r·long = 0.6 · (rest + r·long)

The documents of a class form a circle, in an order drawn from the seed. With ratio r each epoch continues r rounds
further along it. With r = 0.3, epoch 0 contains the first three tenths, epoch 1 the next three, and so on. With r = 2.5
an epoch is two and a half rounds, and the next one starts where it ended. An epoch ends at the document boundary
nearest to the exact token, so

    tokens of a class in the first e epochs = e · r · (tokens of the class)   within half a document, for every e,

and any two documents of a class have occurred equally often, or differ by one.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np

from megalong.errors import UserError


class LengthRules(Protocol):
    """`lengths` of a domain in `data.mixture`; None: the rule is not set."""

    @property
    def drop_below(self) -> int | None: ...
    @property
    def drop_above(self) -> int | None: ...
    @property
    def below(self) -> int | None: ...
    @property
    def keep(self) -> float | None: ...
    @property
    def above(self) -> int | None: ...
    @property
    def repeat(self) -> float | None: ...
    @property
    def share(self) -> float | None: ...
    @property
    def max_repeats(self) -> int | None: ...


@dataclass(frozen=True)
class LengthClass:
    """Documents that an epoch contains `ratio` times.

    Attributes:
        documents: integers [n], the circle.
        ends: int64 [n], tokens up to the end of each document; int64 [0] if every epoch ends with a whole round.
        tokens: tokens of one round.
    """

    documents: np.ndarray
    ends: np.ndarray
    tokens: int
    ratio: float

    def reached(self, epoch: int) -> tuple[int, int]:
        """(documents, tokens) of this class in all epochs before `epoch`, repeats included."""
        if self.ratio.is_integer():
            return epoch * int(self.ratio) * len(self.documents), epoch * int(self.ratio) * self.tokens
        reached = epoch * self.ratio * self.tokens
        rounds = int(reached // self.tokens)
        rest = reached % self.tokens
        place = int(np.searchsorted(self.ends, rest, side="right"))
        before = int(self.ends[place - 1]) if place else 0
        if place < len(self.ends) and rest - before > int(self.ends[place]) - rest:
            before, place = int(self.ends[place]), place + 1
        return rounds * len(self.ends) + place, rounds * self.tokens + before

    def times_before(self, epoch: int) -> np.ndarray:
        """int64 [n]: how often each of `documents` occurs in all epochs before `epoch`."""
        rounds, rest = divmod(self.reached(epoch)[0], len(self.documents))
        return rounds + (np.arange(len(self.documents)) < rest).astype(np.int64)

    def of_epoch(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """(documents, round within the epoch) of one epoch, in the circle's order."""
        first, last = self.reached(epoch)[0], self.reached(epoch + 1)[0]
        size = len(self.documents)
        if first % size == 0 and last - first == size:
            return self.documents, np.zeros(size, np.int8)
        steps = np.arange(first, last)
        return self.documents[steps % size], (steps - first) // size


def length_classes(
    documents: np.ndarray, lengths: np.ndarray, rules: LengthRules | None, random: np.random.RandomState, where: str
) -> list[LengthClass]:
    """The classes of `documents`, without empty classes.

    Args:
        documents: integers [n].
        lengths: int64 [n], tokens of each, all above 0.
        random: shuffles the circles. Not used without rules, or for classes with an integer ratio.
        where: the domain and part, for the error message.

    Raises:
        UserError: the rules leave no document, or a share of tokens is impossible.
    """
    if rules is None:
        return [LengthClass(documents, np.empty(0, np.int64), int(lengths.sum()), 1.0)]
    chosen = np.ones(len(lengths), bool)
    if rules.drop_below is not None:
        chosen &= lengths >= rules.drop_below
    if rules.drop_above is not None:
        chosen &= lengths <= rules.drop_above
    short = chosen & (lengths < rules.below) if rules.below is not None else np.zeros_like(chosen)
    long = chosen & (lengths > rules.above) if rules.above is not None else np.zeros_like(chosen)
    keep, middle = rules.keep or 0.0, chosen & ~short & ~long
    rest = keep * int(lengths[short].sum()) + int(lengths[middle].sum())
    ratios = [(short, keep), (middle, 1.0), (long, _repeat(rules, rest, int(lengths[long].sum()), where))]
    classes = [
        _circle(documents, lengths, np.flatnonzero(members), float(ratio), random)
        for members, ratio in ratios
        if ratio and members.any()
    ]
    if not classes:
        raise UserError(
            f"data.mixture: the lengths rules leave none of the {len(lengths)} documents of {where} (the longest has "
            f"{int(lengths.max())} tokens); loosen them"
        )
    return classes


def _repeat(rules: LengthRules, rest: float, long: int, where: str) -> float:
    """How often an epoch contains a document of the long class; `rest` and `long` are tokens."""
    if rules.share is None:
        return rules.repeat or 0.0
    if not rest or not long:
        raise UserError(
            f"data.mixture: lengths.share {rules.share:g} of {where} is impossible: {'no' if not long else 'every'} "
            f"document is longer than {rules.above} tokens; change above, or write repeat"
        )
    return rules.share / (1 - rules.share) * rest / long


def _circle(
    documents: np.ndarray, lengths: np.ndarray, members: np.ndarray, ratio: float, random: np.random.RandomState
) -> LengthClass:
    tokens = int(lengths[members].sum())
    if ratio.is_integer():
        return LengthClass(documents[members], np.empty(0, np.int64), tokens, ratio)
    members = random.permutation(members)
    return LengthClass(documents[members], np.cumsum(lengths[members]), tokens, ratio)


def to_arrays(classes: list[LengthClass]) -> tuple[np.ndarray, ...]:
    """Classes as arrays for storage: ratios, tokens, then documents and ends of each."""
    heads = np.array([one.ratio for one in classes]), np.array([one.tokens for one in classes], np.int64)
    return heads + tuple(array for one in classes for array in (one.documents, one.ends))


def from_arrays(arrays: tuple[np.ndarray, ...]) -> list[LengthClass]:
    """The classes that `to_arrays` stored."""
    ratios, tokens = arrays[0].tolist(), arrays[1].tolist()
    return [
        LengthClass(documents, ends, whole, ratio)
        for documents, ends, whole, ratio in zip(arrays[2::2], arrays[3::2], tokens, ratios, strict=True)
    ]
