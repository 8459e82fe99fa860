"""Finds documents that share text with a benchmark, by word n-grams as for GPT-3 (arXiv 2005.14165, appendix C): a
document that contains any 13 consecutive words of a benchmark was probably made from it.

    words: lower-case runs of letters and digits     "The cat's 3 hats." → the cat s 3 hats
    a hit: N consecutive words of a document that occur in one text of a benchmark file

A benchmark file is JSON lines or .parquet (every string in a line or row is a text, at any depth), or .txt. Texts of
fewer than N words are not searched for: "yes" would be found everywhere.

Why it is fast: words that no benchmark uses become 0, and an n-gram with a 0 cannot match. The others are hashed by
numpy. Each hash match is then compared word by word, so a collision never drops a document.
"""

import re
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from hashlib import sha256
from typing import Any

import numpy as np

from megalong.data.corpus import parquet
from megalong.data.corpus.records import BYTE_ORDER_MARK, BadRecordError, parsed
from megalong.data.corpus.sources import LINES, TABLE, Source, find_files
from megalong.data.corpus.unpack import unpacked
from megalong.errors import UserError

NGRAM = 13
SHORTEST_WHOLE = 4  # words of the shortest text that `find_whole` searches for: "a cat" would be found everywhere
ACTIONS = ("drop", "report")
_WORDS = re.compile(r"[^\W_]+")
_FACTOR = np.uint64(0x9E3779B97F4A7C15)


@dataclass(frozen=True)
class Hit:
    """Words that a document shares with a benchmark, and the benchmark file."""

    benchmark: str
    words: str


class Benchmarks:
    """The runs of `ngram` words in benchmark files.

    Attributes:
        fingerprint: digest of the texts and settings; part of the fingerprint of finished parts.

    Raises:
        UserError: a file is missing, broken, or contains no text of that many words.
    """

    def __init__(self, files: Sequence[str], ngram: int = NGRAM) -> None:
        self.ngram = ngram
        self._numbers: dict[str, int] = {}
        self._runs: dict[tuple[int, ...], str] = {}
        self._wholes: dict[str, str] = {}
        self._spelling: list[str] = [""]
        content = sha256(str(ngram).encode())
        for source in find_files(files, lambda line: print(f"megalong: --decontaminate: {line}", file=sys.stderr)):
            before = len(self._runs)
            for text in _texts(source):
                self._add(source.path, text)
                content.update(text.encode("utf-8", "surrogatepass") + b"\0")
            if len(self._runs) == before:
                raise UserError(
                    f"--decontaminate: {source.path} contains no new run of {ngram} words; give a benchmark with "
                    "longer texts, or fewer words with --decontaminate-ngram"
                )
        self.fingerprint = content.hexdigest()
        self._hashes = np.unique(_hashes(np.array(list(self._runs), np.uint64)))

    def find(self, texts: Sequence[str]) -> Hit | None:
        """The first run of words that one of `texts` shares with a benchmark."""
        number = self._numbers.get
        for text in texts:
            words = _WORDS.findall(text.lower())
            if len(words) < self.ngram:
                continue
            ids = np.fromiter((number(word, 0) for word in words), np.uint64, len(words))
            for start in self._candidates(ids).tolist():
                run = tuple(ids[start : start + self.ngram].tolist())
                if run in self._runs:
                    return Hit(self._runs[run], " ".join(self._spelling[id] for id in run))
        return None

    def find_whole(self, texts: Sequence[str]) -> Hit | None:
        """The first of `texts` that equals, word for word, a benchmark text of 4 to `ngram` - 1 words."""
        for text in texts:
            whole = " ".join(_WORDS.findall(text.lower()))
            if whole in self._wholes:
                return Hit(self._wholes[whole], whole)
        return None

    def _candidates(self, ids: np.ndarray) -> np.ndarray:
        """Starts of runs without unknown words whose hash occurs in a benchmark."""
        unknown = np.concatenate([[0], np.cumsum(ids == 0)])
        starts = np.flatnonzero(unknown[self.ngram :] == unknown[: -self.ngram])
        if len(starts) == 0:
            return starts
        runs = np.lib.stride_tricks.sliding_window_view(ids, self.ngram)[starts]
        hashes = _hashes(runs)
        places = np.minimum(np.searchsorted(self._hashes, hashes), len(self._hashes) - 1)
        return starts[self._hashes[places] == hashes]

    def _add(self, path: str, text: str) -> None:
        words = _WORDS.findall(text.lower())
        if len(words) < self.ngram:
            if len(words) >= SHORTEST_WHOLE:
                self._wholes.setdefault(" ".join(words), path)
            return
        for word in words:
            if word not in self._numbers:
                self._numbers[word] = len(self._spelling)
                self._spelling.append(word)
        ids = [self._numbers[word] for word in words]
        for start in range(len(ids) - self.ngram + 1):
            self._runs.setdefault(tuple(ids[start : start + self.ngram]), path)


def _hashes(runs: np.ndarray) -> np.ndarray:
    """uint64 [runs, words] → uint64 [runs], wrapping around."""
    hashes = np.zeros(len(runs), np.uint64)
    for column in range(runs.shape[1]):
        hashes = (hashes + runs[:, column]) * _FACTOR
        hashes ^= hashes >> np.uint64(29)
    return hashes


def _texts(source: Source) -> Iterator[str]:
    """Every text of a benchmark file."""
    if source.kind == TABLE:
        columns = parquet.text_columns(source.path)
        groups = len(parquet.row_group_sizes(source.path))
        for _, values in parquet.rows(source.path, 0, groups, columns):
            for value in values:
                yield from _strings(value.decode("utf-8", "replace") if isinstance(value, bytes) else value)
        return
    with unpacked(source.path, source.packing) as stream:
        content = stream.read().removeprefix(BYTE_ORDER_MARK)
    if source.kind != LINES:
        yield content.decode("utf-8", "replace")
        return
    try:
        yield from _strings(parsed(content))  # one object or list, as .json files often are
        return
    except BadRecordError:
        pass
    for number, line in enumerate(content.split(b"\n"), 1):
        if line and not line.isspace():
            try:
                yield from _strings(parsed(line))
            except BadRecordError as error:
                raise UserError(f"--decontaminate: {source.path}, line {number}: {error}") from None


def _strings(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict | list):
        for inner in value.values() if isinstance(value, dict) else value:
            yield from _strings(inner)
