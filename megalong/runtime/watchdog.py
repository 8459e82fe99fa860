"""When no step ends for too long, every rank writes its stacks and ends itself, so that a hang can be explained.

    RUN/stacks/rank-N.txt       what each thread of rank N was doing

Ranks wait for each other in collectives, so one that hangs stops all of them, and all watchdogs fire at about the same
time. Ending one rank ends the job, so after writing each waits a moment for the others to write theirs. The thread
needs the GIL. If the hang holds it, faulthandler's own thread, which does not need it, does the same a little later,
without the explaining line.
"""

from __future__ import annotations

import contextlib
import faulthandler
import os
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Self, TextIO

FOLDER = "stacks"
STATUS = 1


class Watchdog:
    """Watches a block of steps: `with Watchdog(...) as watchdog:`, and `watchdog.beat()` after each step."""

    def __init__(
        self, run: Path, rank: int, minutes: float, on_hang: Callable[[], None], grace_seconds: float = 10.0
    ) -> None:
        """
        Args:
            minutes: time without a beat until it fires; 0: never.
            on_hang: called when it fires, after the stacks are written.
            grace_seconds: time for other ranks to write their stacks; `on_hang` may take most of it.
        """
        self.file = run / FOLDER / f"rank-{rank}.txt"
        self._rank, self._limit, self._grace, self._on_hang = rank, 60 * minutes, grace_seconds, on_hang
        self._beat = time.monotonic()
        self._ended = threading.Event()
        self._stream: TextIO | None = None
        self._fired = False

    def __enter__(self) -> Self:
        if self._limit:
            self.file.parent.mkdir(parents=True, exist_ok=True)
            self._stream = self.file.open("w")
            self.beat()
            threading.Thread(target=self._watch, name="watchdog", daemon=True).start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._stream is None:
            return
        self._ended.set()
        faulthandler.cancel_dump_traceback_later()
        if self._fired:  # another rank has ended itself and this block: keep the stacks, which show the reason
            return
        self._stream.close()
        self.file.unlink(missing_ok=True)
        with contextlib.suppress(OSError):  # not empty: other ranks are running, or an earlier hang left stacks
            self.file.parent.rmdir()

    def beat(self) -> None:
        """Restart the clock: a step, a batch of an evaluation or a save is finished."""
        self._beat = time.monotonic()
        if self._stream is not None:
            faulthandler.dump_traceback_later(self._limit + 2 * self._grace, exit=True, file=self._stream)

    def _watch(self) -> None:
        while not self._ended.wait(max(0.0, self._beat + self._limit - time.monotonic())):
            if time.monotonic() - self._beat >= self._limit:
                self._end_hang()

    def _end_hang(self) -> None:
        line = (
            f"watchdog: rank {self._rank} finished no step for {self._limit / 60:g} minutes "
            f"(runtime.watchdog_minutes); its stacks are in {self.file}; ending, run the same command to resume\n"
        )
        assert self._stream is not None
        self._fired, fired = True, time.monotonic()
        faulthandler.dump_traceback(file=self._stream, all_threads=True)
        # No logger: its lock may be what hangs.
        os.write(2, line.encode())
        self._on_hang()
        if not self._ended.wait(max(0.0, fired + self._grace - time.monotonic())):
            os._exit(STATUS)
