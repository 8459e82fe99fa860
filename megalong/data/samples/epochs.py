"""Epochs of one domain: the documents of each, their order, and where in the stream the epoch begins.

Without length rules every epoch is a permutation of all documents. With rules its documents follow from length classes
(length_rules.py), and its number of tokens varies by about a document. The start of an epoch is still a closed formula,
so the epoch of any token is found without walking the stream.

A document that occurs K times in an epoch occurs once in each K-th of it, not twice in a row by chance.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from megalong.data.samples.length_rules import LengthClass


class Epochs:
    """The epochs of documents in `classes`.

    Attributes:
        tokens_per_epoch: mean number of tokens of an epoch, rounded.
        vary: whether epochs contain different documents.
    """

    def __init__(self, classes: Sequence[LengthClass]) -> None:
        self.classes = classes
        self._mean = sum(one.ratio * one.tokens for one in classes)
        self.tokens_per_epoch = max(1, round(self._mean))
        self.vary = not all(one.ratio.is_integer() for one in classes)
        self._last = (0, 0, 0)  # (epoch, its first token, its end) of the last look-up; most look-ups stay in it

    def start(self, epoch: int) -> int:
        """The first token of `epoch` in the stream."""
        return sum(one.reached(epoch)[1] for one in self.classes)

    def at(self, token: int) -> int:
        """The epoch of token `token` of the stream."""
        return self.around(token)[0]

    def around(self, token: int) -> tuple[int, int]:
        """(epoch, first token of that epoch) of token `token` of the stream."""
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
        """The documents of `epoch`, in the order of the stream."""
        parts = [one.of_epoch(epoch) for one in self.classes]
        documents = parts[0][0] if len(parts) == 1 else np.concatenate([members for members, _ in parts])
        if all(len(rounds) == 0 or rounds[-1] == 0 for _, rounds in parts):
            return np.asarray(documents[random.permutation(len(documents))])
        places = [(rounds + random.random_sample(len(rounds))) / (rounds[-1] + 1) for _, rounds in parts if len(rounds)]
        return np.asarray(documents[np.argsort(np.concatenate(places), kind="stable")])
