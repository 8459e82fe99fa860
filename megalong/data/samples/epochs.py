"""Epochs of one domain: which documents each holds, in which order, and where in the stream it begins.

Without length rules every epoch is a permutation of all documents. With rules its documents follow from their classes
(length_rules.py), and its tokens vary by about a document from epoch to epoch; where an epoch begins is still a closed
formula, so the epoch of any token is found without walking there.

A document that comes K times in an epoch comes once in each K-th part of it, not twice in a row by chance.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from megalong.data.samples.length_rules import LengthClass


class Epochs:
    """The epochs that `classes` make up.

    Attributes:
        tokens_per_epoch: tokens of an epoch, rounded, on average over all of them.
        vary: whether epochs hold different documents.
    """

    def __init__(self, classes: Sequence[LengthClass]) -> None:
        self.classes = classes
        self._mean = sum(one.ratio * one.tokens for one in classes)
        self.tokens_per_epoch = max(1, round(self._mean))
        self.vary = not all(one.ratio.is_integer() for one in classes)
        self._last = (0, 0, 0)  # an epoch, its first token and the first one behind it: most look-ups stay in it

    def start(self, epoch: int) -> int:
        """The token of the stream at which `epoch` begins."""
        return sum(one.reached(epoch)[1] for one in self.classes)

    def at(self, token: int) -> int:
        """The epoch that holds token `token` of the stream."""
        return self.around(token)[0]

    def around(self, token: int) -> tuple[int, int]:
        """(epoch, its first token) for token `token` of the stream."""
        epoch, first, end = self._last
        if not first <= token < end:
            epoch = int(token / self._mean)
            while self.start(epoch) > token:
                epoch -= 1
            while self.start(epoch + 1) <= token:
                epoch += 1
            first, end = self.start(epoch), self.start(epoch + 1)
            self._last = epoch, first, end
        return epoch, first

    def shuffled(self, epoch: int, random: np.random.RandomState) -> np.ndarray:
        """The documents of `epoch`, whole numbers, in the order in which the stream holds them."""
        parts = [one.of_epoch(epoch) for one in self.classes]
        documents = parts[0][0] if len(parts) == 1 else np.concatenate([held for held, _ in parts])
        if all(len(rounds) == 0 or rounds[-1] == 0 for _, rounds in parts):
            return np.asarray(documents[random.permutation(len(documents))])
        places = [(rounds + random.random_sample(len(rounds))) / (rounds[-1] + 1) for _, rounds in parts if len(rounds)]
        return np.asarray(documents[np.argsort(np.concatenate(places), kind="stable")])
