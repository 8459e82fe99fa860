"""Progress of a long read: one moving line on a terminal, a plain line now and then in a log.

12.3 MB of 125.0 MB (10 %) | 3,210 documents | 1,230 documents/s | 5.1 MB/s | ETA 0:00:22
"""

import sys
import time
from datetime import timedelta
from typing import TextIO

TERMINAL_SECONDS = 0.2
LOG_SECONDS = 10.0


class Progress:
    """Tells how far a read of `total_bytes` has come.

    Args:
        stream: where to; standard error unless told otherwise.
        what: what is counted.
    """

    def __init__(self, total_bytes: int, stream: TextIO | None = None, what: str = "documents") -> None:
        self._total, self._what = total_bytes, what
        self._stream = stream or sys.stderr
        self._terminal = self._stream.isatty()
        self._start = self._last = time.monotonic()

    @property
    def seconds(self) -> float:
        """Seconds since the start."""
        return time.monotonic() - self._start

    def update(self, position: int, documents: int) -> None:
        """Tell it, unless it was told a moment ago: `position` bytes read, `documents` done."""
        now = time.monotonic()
        if now - self._last < (TERMINAL_SECONDS if self._terminal else LOG_SECONDS):
            return
        self._last = now
        self._stream.write(self._dressed(self.line(position, documents)))
        self._stream.flush()

    def finish(self) -> None:
        """Wipe the moving line, so that what follows starts on a line of its own."""
        if self._terminal:
            self._stream.write("\r\x1b[K")
            self._stream.flush()

    def line(self, position: int, documents: int) -> str:
        """The line itself."""
        seconds = max(self.seconds, 1e-9)
        remaining = (self._total - position) * seconds / position if position else 0.0
        return (
            f"{position / 1e6:,.1f} MB of {self._total / 1e6:,.1f} MB ({position / max(self._total, 1):.0%}) | "
            f"{documents:,} {self._what} | {documents / seconds:,.0f} {self._what}/s | "
            f"{position / 1e6 / seconds:,.1f} MB/s | ETA {timedelta(seconds=round(remaining))}"
        )

    def _dressed(self, line: str) -> str:
        return f"\r{line}\x1b[K" if self._terminal else f"{line}\n"
