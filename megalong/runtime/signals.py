"""What signals do: SIGTERM, SIGUSR1 and Ctrl-C (SIGINT) ask a run to save and leave; any other command ends by Ctrl-C.

    a command                  the first Ctrl-C raises KeyboardInterrupt, once, so that what is half written is removed
    a rank, before its steps   the first Ctrl-C ends it: nothing is to be saved, and it may wait in a collective
    a rank that trains         a signal is noted, and said at once; ranks agree on it between micro-batches
    all of them                a second Ctrl-C ends the process at once, status 130

A handler of Python's runs between two of the main thread's instructions, which one call into torch may keep apart for
minutes. So it only sets a value (training/interrupt.py looks at it), and what must happen at once is done by a thread:
C's handler writes the signal's number into a pipe (`signal.set_wakeup_fd`), and the thread reads it. It writes its line
with `os.write`: the main thread may hold the logger's lock.

One press of Ctrl-C may arrive more than once: a terminal sends it to every process of its foreground group, and a
launcher (torchrun, `--nproc`) passes its own on. So those that follow within a moment are the same. torchrun
starts its workers where no terminal reaches them, and passes a second Ctrl-C on as SIGTERM. A run that trains listens
even where it was started deaf, as `trap ''` and a script's `command &` do: whoever sends a signal means it.

Needs no torch, so that it listens before torch is imported.
"""

from __future__ import annotations

import contextlib
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from types import FrameType
from typing import Any, NoReturn

SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
STATUS = 130  # what shells say of a process that Ctrl-C has ended
# Between the arrivals of one press: without a launcher (wrappers such as `timeout` send it twice), and under one.
SAME_PRESS_SECONDS, SAME_PRESS_UNDER_LAUNCHER = 0.1, 1.0
PASSED_ON = "MEGALONG_SIGNALS_ARE_PASSED_ON"  # set for a child by a parent other than a launcher that passes them on
NOT_SAVED = "Ctrl-C again: ended at once, without a save; the same command goes on from the newest whole checkpoint"
_ENDED = "interrupted again: ended at once"


@dataclass(frozen=True)
class Received:
    """The first signal: its name, and when it came by `time.monotonic()`."""

    name: str
    moment: float


Outlook = Callable[[Received], str]


def _at_first_step(first: Received) -> str:
    return "the run leaves at its first step"


_received: Received | None = None
_before: dict[int, Any] = {}
_outlook: Outlook = _at_first_step
_ends: str | None = None  # what is said when the first SIGINT ends this process; None: it asks for a save
_presses = 0
_last_press = 0.0
_pipe: tuple[int, int] | None = None


def listen(*numbers: signal.Signals) -> None:
    """Note these signals from now on (all of `SIGNALS` unless given), forgetting earlier ones; for the main thread."""
    global _received, _ends, _presses
    _received, _presses = None, 0
    for number in numbers or SIGNALS:
        _take(number)
    if signal.SIGINT in (numbers or SIGNALS):
        _ends = None


def listen_to_all(outlook: Outlook = _at_first_step) -> None:
    """Note SIGTERM and SIGINT too, where any signal is listened to.

    Before the first step there is nothing to save, and a process that waits for one which is gone must be ended by it.

    Args:
        outlook: what happens next, for the line that is said when a signal comes; called in a thread.
    """
    global _outlook, _ends
    if _before:
        _outlook, _ends = outlook, None
        for number in SIGNALS:
            _take(number)


def end_at_interrupt(said: str = "interrupted") -> None:
    """Let the first SIGINT end this process at once, wherever it is, with the line `said`.

    Where signals are listened to already, that stays as it is.
    """
    global _ends, _presses
    if not _before and _in_main_thread():
        _ends, _presses = said, 0
        _take(signal.SIGINT)


def restore_handlers() -> None:
    """Let signals do again what they did before, and forget what came."""
    global _received, _outlook, _ends
    _received, _outlook, _ends = None, _at_first_step, None
    while _before:
        number, handler = _before.popitem()
        signal.signal(number, handler)
    _stop_watching()


def received() -> Received | None:
    """The first signal since `listen`, None as long as there was none."""
    return _received


@contextlib.contextmanager
def interruptible() -> Iterator[Callable[[], bool]]:
    """A block that the first SIGINT ends by one KeyboardInterrupt, and a second at once.

    What is yielded says whether one came: libraries make other exceptions of it, and may lose it in a destructor.
    """
    presses: list[float] = []

    def raise_once(number: int, frame: FrameType | None) -> None:
        presses.append(time.monotonic())
        if len(presses) == 1:
            raise KeyboardInterrupt
        if presses[-1] - presses[-2] > _same_press():
            _end(_ENDED)

    ours = _in_main_thread() and signal.getsignal(signal.SIGINT) is signal.default_int_handler
    if ours:
        signal.signal(signal.SIGINT, raise_once)
    try:
        yield lambda: bool(presses)
    finally:
        if ours:
            signal.signal(signal.SIGINT, signal.default_int_handler)


@contextlib.contextmanager
def kept_from_children() -> Iterator[None]:
    """Processes started in this block never get SIGINT: a terminal's Ctrl-C is for their parent, which ends them.

    They inherit the mask, also through `exec`.
    """
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _in_main_thread() -> bool:
    return threading.current_thread() is threading.main_thread()


def _same_press() -> float:
    passed_on = "RANK" in os.environ or PASSED_ON in os.environ
    return SAME_PRESS_UNDER_LAUNCHER if passed_on else SAME_PRESS_SECONDS


def _take(number: signal.Signals) -> None:
    if number in _before:
        return
    _watch()
    _before[number] = signal.signal(number, _note)


def _note(number: int, frame: FrameType | None) -> None:
    _keep(number)


def _keep(number: int) -> None:
    global _received
    if _received is None and (number != signal.SIGINT or _ends is None):
        _received = Received(signal.Signals(number).name, time.monotonic())


def _watch() -> None:
    """Start the thread that hears of signals at once, unless it runs."""
    global _pipe
    if _pipe is not None:
        return
    _pipe = os.pipe()
    os.set_blocking(_pipe[1], False)
    signal.set_wakeup_fd(_pipe[1], warn_on_full_buffer=False)
    threading.Thread(target=_hear, args=(_pipe[0],), name="signals", daemon=True).start()


def _stop_watching() -> None:
    global _pipe
    if _pipe is not None:
        signal.set_wakeup_fd(-1)
        os.close(_pipe[1])  # the thread reads the end of it
        _pipe = None


def _hear(pipe: int) -> None:
    said: set[int] = set()
    while numbers := os.read(pipe, 64):
        for number in numbers:
            if number in SIGNALS and number in _before:
                _act(number, said)
    os.close(pipe)


def _act(number: int, said: set[int]) -> None:
    """What a signal does at once; `said`: signals of which a line was said."""
    if number == signal.SIGINT or (number == signal.SIGTERM and _presses and "TORCHELASTIC_RUN_ID" in os.environ):
        _press()
    _keep(number)
    first = _received
    if number in said or first is None:
        return
    said.add(number)
    name = signal.Signals(number).name
    again = "; Ctrl-C again ends it at once, without a save" if number == signal.SIGINT else ""
    try:
        outlook = _outlook(first)
    except Exception as error:  # this thread must go on: it is what ends the process at a second press
        outlook = f"the run saves and leaves ({type(error).__name__})"
    say(f"{time.strftime('%Y-%m-%d %H:%M:%S')} signal {name}: {outlook}{again}")


def _press() -> None:
    """Ctrl-C, or the same press once more; ends this process where it should."""
    global _presses, _last_press
    now = time.monotonic()
    if _presses == 0 or now - _last_press > _same_press():
        _presses += 1
    _last_press = now
    if _ends is not None:
        _end(_ends)
    if _presses > 1:
        _end(NOT_SAVED)


def _end(said: str) -> NoReturn:
    say(f"megalong: {said}")
    os._exit(STATUS)


def say(line: str) -> None:
    """A line on stderr, by the first rank of each node: a launcher passes a signal on to all of them."""
    if os.environ.get("LOCAL_RANK", os.environ.get("RANK", "0")) == "0":
        with contextlib.suppress(OSError):
            os.write(2, f"{line}\n".encode())


def _leave_to_parent() -> None:
    """For a forked helper (a data worker), which has no run to save: SIGTERM ends it, Ctrl-C is its parent's."""
    listening = bool(_before)
    global _pipe
    if _pipe is not None:
        signal.set_wakeup_fd(-1)
        for end in _pipe:
            os.close(end)
        _pipe = None
    restore_handlers()
    if listening:
        signal.signal(signal.SIGINT, signal.SIG_IGN)


os.register_at_fork(after_in_child=_leave_to_parent)
