"""Goodput of a run over all its lives: the share of its time that went into steps it still has.

    goodput = useful seconds / wall seconds
    useful    data, forward, backward and optimizer time of the steps that the current weights contain
    wall      from each life's process start to its last sign of life; queue time between lives is counted separately

A run killed at step 170 that resumes from step 150 repeats steps 151-170. The first life's 20 steps no longer count,
nor do steps that the guard rolls back or skips. The book therefore keeps useful seconds by step, and a resumed run
continues from the entry of its step. Rank 0 writes it to RUN/health.json. If that file is lost or torn, counting starts
anew and the run goes on.
"""

from __future__ import annotations

import bisect
import json
import logging
import time
from dataclasses import asdict, dataclass, field
from itertools import pairwise
from pathlib import Path

from megalong.runtime.folders import file_aside

log = logging.getLogger("megalong")

FILE = "health.json"
WRITE_SECONDS = 10.0  # between routine writes
_MAX_MARKS = 4000
_SAME_LIFE = 1.0  # seconds of tolerance for a process's start time


@dataclass
class Book:
    """The file's content. `lives`: [start, last sign] in seconds since 1970; `marks`: [step, useful seconds so far]."""

    lives: list[list[float]] = field(default_factory=list)
    marks: list[list[float]] = field(default_factory=list)
    skipped: int = 0
    pauses: float = 0.0


class Ledger:
    """The book of one run, open for one life (or for one more in the same process, after a rollback)."""

    def __init__(self, run: Path, step: int, started: float, now: float | None = None) -> None:
        """Continue from `step`. `started`: start of this process, in seconds since 1970."""
        self._file = run / FILE
        self.book = _read(self._file)
        now = time.time() if now is None else now
        if not self.book.lives or abs(self.book.lives[-1][0] - started) > _SAME_LIFE:
            self.book.lives.append([started, now])
        useful = self._useful_at(step)
        self.book.marks = [mark for mark in self.book.marks if mark[0] < step]
        self.book.marks.append([step, useful])
        self._written = 0.0

    def add(self, step: int, useful: float, pause: float, skipped: int, now: float | None = None) -> None:
        """Steps up to `step` took `useful` seconds, saves paused training for `pause`, `skipped` were not applied."""
        book = self.book
        book.marks.append([step, book.marks[-1][1] + useful])
        book.pauses += pause
        book.skipped += skipped
        if len(book.marks) > _MAX_MARKS:
            book.marks = [*book.marks[:-1:2], book.marks[-1]]
        self.beat(now)

    def beat(self, now: float | None = None) -> None:
        """Still alive."""
        self.book.lives[-1][1] = time.time() if now is None else now

    def write(self, at_once: bool = True) -> None:
        """Write the book to disk; without `at_once` only if the last write is `WRITE_SECONDS` ago."""
        if not at_once and time.monotonic() - self._written < WRITE_SECONDS:
            return
        self._written = time.monotonic()
        try:
            with file_aside(self._file) as aside:
                aside.write_text(json.dumps({**asdict(self.book), "goodput": round(self.goodput, 4)}) + "\n")
        except OSError as error:
            log.warning("%s: %s; goodput is not saved", self._file, error.strerror)

    @property
    def wall(self) -> float:
        """Seconds of all lives."""
        return sum(last - first for first, last in self.book.lives)

    @property
    def waited(self) -> float:
        """Seconds between lives."""
        lives = self.book.lives
        return sum(max(0.0, after[0] - before[1]) for before, after in pairwise(lives))

    @property
    def goodput(self) -> float:
        """Useful share of the wall seconds, 0 to 1."""
        return min(1.0, self.book.marks[-1][1] / max(self.wall, 1e-9))

    @property
    def restarts(self) -> int:
        """Lives after the first."""
        return len(self.book.lives) - 1

    def _useful_at(self, step: int) -> float:
        """Useful seconds up to `step`, interpolated between two marks."""
        marks = self.book.marks
        place = bisect.bisect_left(marks, float(step), key=lambda mark: mark[0])
        if place == len(marks):
            return marks[-1][1] if marks and step else 0.0
        high = marks[place]
        if high[0] == step or place == 0:
            return high[1] if high[0] == step else 0.0
        low = marks[place - 1]
        return low[1] + (high[1] - low[1]) * (step - low[0]) / (high[0] - low[0])


def _read(file: Path) -> Book:
    try:
        values = json.loads(file.read_text())
        book = Book(**{name: values[name] for name in ("lives", "marks", "skipped", "pauses")})
        if all(len(pair) == 2 for pair in [*book.lives, *book.marks]):
            return book
    except FileNotFoundError:
        return Book()
    except (OSError, ValueError, KeyError, TypeError):
        pass
    log.warning("%s cannot be read; goodput and restarts are counted from zero", file)
    return Book()
