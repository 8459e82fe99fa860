"""Inserts sentences into a text of tokens without breaking the text.

A place is given as a share of the text. The sentence goes to the nearest token boundary at which a line or a sentence
ends. If WINDOW tokens contain no such boundary, it goes to the nearest one between whole characters (a byte-level
vocabulary may split a character). The sentence is on a line of its own.
"""

from __future__ import annotations

from functools import cache

import numpy as np

from megalong.data.samples.piece import Span
from megalong.data.tokenizer import TextTokenizer

WINDOW = 64
ENDS = (".", "!", "?", "。", "！", "？")
BROKEN = "\ufffd"


class Planter:
    """Inserts sentences into texts that were tokenized with `tokenizer`."""

    def __init__(self, tokenizer: TextTokenizer) -> None:
        self._decode = tokenizer.decode
        self._spelled = cache(lambda id: tokenizer.decode([id]))

    def plant(self, text: np.ndarray, sentences: list[list[int]], depths: list[float]) -> tuple[np.ndarray, list[Span]]:
        """`text` with each of `sentences` at its depth.

        Args:
            text: int64 [tokens]; sentences: IDs of each, in the order in which they are inserted.
            depths: shares of the text, ascending: 0 is its beginning, 1 its end.

        Returns:
            (int64 [tokens of all], (first token, end) of each sentence in it).
        """
        places = sorted(self.place(text, round(depth * len(text))) for depth in depths)
        parts, spans, before, length = [], [], 0, 0
        for place, sentence in zip(places, sentences, strict=True):
            length += place - before
            parts += [text[before:place], np.array(sentence, np.int64)]
            spans.append((length, length + len(sentence)))
            length += len(sentence)
            before = place
        return np.concatenate([*parts, text[before:]]), spans

    def place(self, text: np.ndarray, wanted: int) -> int:
        """The place nearest to `wanted` at which a sentence may be inserted, as the number of tokens before it."""
        low, high = max(0, wanted - WINDOW), min(len(text), wanted + WINDOW)
        near = sorted(range(low, high + 1), key=lambda place: (abs(place - wanted), place))
        for good in (self._between_sentences, self._between_characters):
            for place in near:
                if place in (0, len(text)) or good(text, place):
                    return place
        return wanted

    def _between_sentences(self, text: np.ndarray, place: int) -> bool:
        last, first = self._spelled(int(text[place - 1])), self._spelled(int(text[place]))
        return last.endswith("\n") or (last.rstrip(" ").endswith(ENDS) and not first[:1].strip())

    def _between_characters(self, text: np.ndarray, place: int) -> bool:
        """Whether a character begins here. It has at most four bytes, and its middle bytes decode to BROKEN."""
        return not self._decode(text[place : place + 4].tolist()).startswith(BROKEN)
