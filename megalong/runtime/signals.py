"""SIGTERM and SIGUSR1 ask a run to save and leave; here they only leave a note.

A handler runs between any two instructions, in the middle of a save too, so it does nothing but set a value. Ranks look
at it where they agree on what to do (training/interrupt.py). Only the first signal counts: a second changes nothing,
so that it cannot damage what the first has set off. Needs no torch, so that it listens before torch is imported.
"""

from __future__ import annotations

import os
import signal
import time
from dataclasses import dataclass
from types import FrameType
from typing import Any

SIGNALS = (signal.SIGTERM, signal.SIGUSR1)


@dataclass(frozen=True)
class Received:
    """The first signal: its name, and when it came by `time.monotonic()`."""

    name: str
    moment: float


_received: Received | None = None
_before: dict[int, Any] = {}


def listen(*numbers: signal.Signals) -> None:
    """Note these signals from now on (all of `SIGNALS` unless given), forgetting earlier ones; for the main thread."""
    global _received
    _received = None
    for number in numbers or SIGNALS:
        _before.setdefault(number, signal.signal(number, _note))


def listen_to_all() -> None:
    """Note SIGTERM too, where any signal is listened to.

    Before the first step there is nothing to save, and a process that waits for one which is gone must be ended by it.
    """
    if _before:
        for number in set(SIGNALS) - set(_before):
            _before[number] = signal.signal(number, _note)


def ignore_no_more() -> None:
    """Let signals do again what they did before `listen`, and forget what came."""
    global _received
    _received = None
    while _before:
        number, handler = _before.popitem()
        signal.signal(number, handler)


def received() -> Received | None:
    """The first signal since `listen`, None as long as there was none."""
    return _received


def _note(number: int, frame: FrameType | None) -> None:
    global _received
    if _received is None:
        _received = Received(signal.Signals(number).name, time.monotonic())


# A forked helper (a data worker) is ended by SIGTERM; it has no run to save.
os.register_at_fork(after_in_child=ignore_no_more)
