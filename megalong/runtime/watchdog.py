"""A hang leaves a trace: when no step ends for too long, every rank writes its stacks and ends itself.

    RUN/stacks/rank-N.txt       what each thread of rank N was doing

A rank waits for others in a collective, so one that hangs stops all of them, and all their watchdogs wake at about the
same time. Ending one ends the job, so each waits a moment after writing for the others to write theirs. The thread
needs Python's lock; where the hang holds that, faulthandler's own thread, which needs none, does the same a little
later and without the explaining line.
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
    """Watches over a block of steps: `with Watchdog(...) as dog: … dog.beat()` after each."""

    def __init__(
        self, run: Path, rank: int, minutes: float, tell: Callable[[], None], moment_seconds: float = 10.0
    ) -> None:
        """
        Args:
            minutes: without a beat until it wakes; 0: it never does.
            tell: called when it wakes, after the stacks are written.
            moment_seconds: how long other ranks get to write theirs; `tell` may take most of it.
        """
        self.file = run / FOLDER / f"rank-{rank}.txt"
        self._rank, self._limit, self._moment, self._tell = rank, 60 * minutes, moment_seconds, tell
        self._beat = time.monotonic()
        self._ended = threading.Event()
        self._stream: TextIO | None = None
        self._woke = False

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
        if self._woke:  # what ended the block is another rank that has ended itself: these stacks are the reason
            return
        self._stream.close()
        self.file.unlink(missing_ok=True)
        with contextlib.suppress(OSError):  # not empty: other ranks are still at work, or an earlier hang's
            self.file.parent.rmdir()

    def beat(self) -> None:
        """Something has been finished: a step, a batch of an evaluation, a save."""
        self._beat = time.monotonic()
        if self._stream is not None:
            faulthandler.dump_traceback_later(self._limit + 2 * self._moment, exit=True, file=self._stream)

    def _watch(self) -> None:
        while not self._ended.wait(max(0.0, self._beat + self._limit - time.monotonic())):
            if time.monotonic() - self._beat >= self._limit:
                self._give_up()

    def _give_up(self) -> None:
        told = (
            f"watchdog: rank {self._rank} finished no step for {self._limit / 60:g} minutes "
            f"(runtime.watchdog_minutes); its stacks are in {self.file}, ending the run; the same command resumes it\n"
        )
        assert self._stream is not None
        self._woke, woke = True, time.monotonic()
        faulthandler.dump_traceback(file=self._stream, all_threads=True)
        # No logger: its lock may be what hangs.
        os.write(2, told.encode())
        self._tell()
        if not self._ended.wait(max(0.0, woke + self._moment - time.monotonic())):
            os._exit(STATUS)
