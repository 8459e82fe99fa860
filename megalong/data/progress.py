"""Progress of a long read: one line that updates on a terminal, a plain line every LOG_SECONDS in a log.

    reading: 12.3 MB of 125.0 MB (10 %) | 3,210 documents | 1,230 documents/s | 5.1 MB/s | ETA 0:00:22

Rates and the remaining time are computed over the last minute. What an earlier run has done therefore counts as
progress but not as speed, and a read that slows down shows it.
"""

import sys
import time
from collections import deque
from datetime import timedelta
from typing import TextIO

TERMINAL_SECONDS = 0.2
LOG_SECONDS = 10.0
WINDOW_SECONDS = 60.0


class Progress:
    """Prints the progress of a read of `total_bytes`.

    Args:
        stream: where to print; None: standard error.
        what: what is counted.
        doing: name of this phase, if there are several.
        position, documents: what an earlier run has done.
    """

    def __init__(
        self,
        total_bytes: int,
        stream: TextIO | None = None,
        what: str = "documents",
        doing: str = "",
        position: int = 0,
        documents: int = 0,
    ) -> None:
        self._total, self._what, self._doing = total_bytes, what, f"{doing}: " if doing else ""
        self._stream = stream or sys.stderr
        self._terminal = self._stream.isatty()
        self._start = self._last = time.monotonic()
        self._marks = deque([(self._start, position, documents)])  # one a second, of the last minute

    @property
    def seconds(self) -> float:
        """Seconds since the start."""
        return time.monotonic() - self._start

    def update(self, position: int, documents: int) -> None:
        """Print a line, unless one was printed a moment ago. `position` (bytes read) and `documents` are totals."""
        now = time.monotonic()
        if now - self._last >= (TERMINAL_SECONDS if self._terminal else LOG_SECONDS):
            self._last = now
            self._stream.write(self._framed(self.line(position, documents)))
            self._stream.flush()
        if now - self._marks[-1][0] >= 1:
            self._marks.append((now, position, documents))
            while now - self._marks[1][0] > WINDOW_SECONDS:
                self._marks.popleft()

    def finish(self) -> None:
        """Clear the terminal's progress line, so that later output starts on a line of its own."""
        if self._terminal:
            self._stream.write("\r\x1b[K")
            self._stream.flush()

    def line(self, position: int, documents: int) -> str:
        """The progress line."""
        since, first, done = self._marks[0]
        seconds = max(time.monotonic() - since, 1e-9)
        speed = (position - first) / seconds
        left = f"{timedelta(seconds=round((self._total - position) / speed))}" if speed > 0 else "not known yet"
        return (
            f"{self._doing}{position / 1e6:,.1f} MB of {self._total / 1e6:,.1f} MB "
            f"({position / max(self._total, 1):.0%}) | {documents:,} {self._what} | "
            f"{(documents - done) / seconds:,.0f} {self._what}/s | {speed / 1e6:,.1f} MB/s | ETA {left}"
        )

    def _framed(self, line: str) -> str:
        return f"\r{line}\x1b[K" if self._terminal else f"{line}\n"
