"""Signal handling: on SIGTERM, SIGUSR1 and Ctrl-C (SIGINT) a run saves and exits; other commands end on Ctrl-C.

    a command                  the first Ctrl-C raises KeyboardInterrupt, once, so that partial output is removed
    a rank, before its steps   the first Ctrl-C ends it: there is nothing to save, and it may wait in a collective
    a rank that trains         a signal is recorded and printed at once; ranks agree on it between micro-batches
    all of them                a second Ctrl-C ends the process at once, status 130

A Python handler runs between two instructions of the main thread, and one call into torch may take minutes. So the
handler only sets a value (training/interrupt.py reads it), and a thread does what must happen at once: the C handler
writes the signal's number into a pipe (`signal.set_wakeup_fd`), and the thread reads it. The thread prints with
`os.write`, because the main thread may hold the logger's lock.

One press of Ctrl-C may arrive more than once: a terminal sends it to every process of its foreground group, and a
launcher (torchrun, `--nproc`) passes its own on. So signals that follow within a moment count as the same press.
torchrun starts its workers where no terminal reaches them, and passes a second Ctrl-C on as SIGTERM. A run that trains
handles signals even if it was started with them ignored, as by `trap ''` or a script's `command &`: whoever sends a
signal means it.

Needs no torch, so that signals are handled before torch is imported.
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
STATUS = 130  # the exit status that shells report after Ctrl-C
# Longest gap between arrivals of one press: without a launcher (wrappers like `timeout` send it twice), and with one.
SAME_PRESS_SECONDS, SAME_PRESS_UNDER_LAUNCHER = 0.1, 1.0
PASSED_ON = "MEGALONG_SIGNALS_ARE_PASSED_ON"  # set for a child by a parent that passes signals on
NOT_SAVED = "Ctrl-C again: ended at once, without a save; run the same command to resume from the newest checkpoint"
_ENDED = "interrupted again: ended at once"


@dataclass(frozen=True)
class Received:
    """The first signal: its name, and when it arrived by `time.monotonic()`."""

    name: str
    moment: float


Outlook = Callable[[Received], str]


def _at_first_step(first: Received) -> str:
    return "the run exits at its first step"


_received: Received | None = None
_previous: dict[int, Any] = {}
_outlook: Outlook = _at_first_step
_exit_message: str | None = None  # printed when the first SIGINT ends this process; None: SIGINT requests a save
_presses = 0
_last_press = 0.0
_pipe: tuple[int, int] | None = None


def listen(*numbers: signal.Signals) -> None:
    """Record these signals from now on (all of `SIGNALS` by default) and forget earlier ones; main thread only."""
    global _received, _exit_message, _presses
    _received, _presses = None, 0
    for number in numbers or SIGNALS:
        _install(number)
    if signal.SIGINT in (numbers or SIGNALS):
        _exit_message = None


def listen_to_all(outlook: Outlook = _at_first_step) -> None:
    """Record SIGTERM and SIGINT too, if any signal is being recorded.

    Call at the first step: before it there is nothing to save, and these signals must end a process even if it waits
    for one that is gone.

    Args:
        outlook: says what happens next, for the line that is printed when a signal arrives; called in a thread.
    """
    global _outlook, _exit_message
    if _previous:
        _outlook, _exit_message = outlook, None
        for number in SIGNALS:
            _install(number)


def end_at_interrupt(message: str = "interrupted") -> None:
    """Make the first SIGINT end this process at once, wherever it is, and print `message`.

    If signals are already being recorded, nothing changes.
    """
    global _exit_message, _presses
    if not _previous and _in_main_thread():
        _exit_message, _presses = message, 0
        _install(signal.SIGINT)


def restore_handlers() -> None:
    """Restore the previous signal handlers, and forget received signals."""
    global _received, _outlook, _exit_message
    _received, _outlook, _exit_message = None, _at_first_step, None
    while _previous:
        number, handler = _previous.popitem()
        signal.signal(number, handler)
    _stop_thread()


def received() -> Received | None:
    """The first signal since `listen`, or None."""
    return _received


@contextlib.contextmanager
def interruptible() -> Iterator[Callable[[], bool]]:
    """A block in which the first SIGINT raises one KeyboardInterrupt, and a second ends the process at once.

    Yields a function that returns whether a SIGINT arrived: libraries turn KeyboardInterrupt into other exceptions, or
    lose it in a destructor.
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
def sigint_blocked_for_children() -> Iterator[None]:
    """Block SIGINT in processes started in this block: a terminal's Ctrl-C is for their parent, which ends them.

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


def _install(number: signal.Signals) -> None:
    if number in _previous:
        return
    _start_thread()
    _previous[number] = signal.signal(number, _handle)


def _handle(number: int, frame: FrameType | None) -> None:
    _record(number)


def _record(number: int) -> None:
    global _received
    if _received is None and (number != signal.SIGINT or _exit_message is None):
        _received = Received(signal.Signals(number).name, time.monotonic())


def _start_thread() -> None:
    """Start the thread that reads signals from the pipe, unless it runs."""
    global _pipe
    if _pipe is not None:
        return
    _pipe = os.pipe()
    os.set_blocking(_pipe[1], False)
    signal.set_wakeup_fd(_pipe[1], warn_on_full_buffer=False)
    threading.Thread(target=_read_signals, args=(_pipe[0],), name="signals", daemon=True).start()


def _stop_thread() -> None:
    global _pipe
    if _pipe is not None:
        signal.set_wakeup_fd(-1)
        os.close(_pipe[1])  # the thread then reads the end of the pipe
        _pipe = None


def _read_signals(pipe: int) -> None:
    reported: set[int] = set()
    while numbers := os.read(pipe, 64):
        for number in numbers:
            if number in SIGNALS and number in _previous:
                _react(number, reported)
    os.close(pipe)


def _react(number: int, reported: set[int]) -> None:
    """Do what a signal requires at once; `reported`: signals already printed."""
    if number == signal.SIGINT or (number == signal.SIGTERM and _presses and "TORCHELASTIC_RUN_ID" in os.environ):
        _press()
    _record(number)
    first = _received
    if number in reported or first is None:
        return
    reported.add(number)
    name = signal.Signals(number).name
    again = "; Ctrl-C again ends it at once, without a save" if number == signal.SIGINT else ""
    try:
        outlook = _outlook(first)
    except Exception as error:  # this thread must go on: it ends the process on a second press
        outlook = f"the run saves and exits ({type(error).__name__})"
    print_line(f"{time.strftime('%Y-%m-%d %H:%M:%S')} signal {name}: {outlook}{again}")


def _press() -> None:
    """Count a Ctrl-C unless it is the same press again, and end the process if it must end."""
    global _presses, _last_press
    now = time.monotonic()
    if _presses == 0 or now - _last_press > _same_press():
        _presses += 1
    _last_press = now
    if _exit_message is not None:
        _end(_exit_message)
    if _presses > 1:
        _end(NOT_SAVED)


def _end(message: str) -> NoReturn:
    print_line(f"megalong: {message}")
    os._exit(STATUS)


def print_line(line: str) -> None:
    """Print to stderr on the first rank of each node only, because a launcher passes a signal on to all ranks."""
    if os.environ.get("LOCAL_RANK", os.environ.get("RANK", "0")) == "0":
        with contextlib.suppress(OSError):
            os.write(2, f"{line}\n".encode())


def _reset_in_child() -> None:
    """In a forked helper (a data worker), which has no run to save: SIGTERM ends it, its parent handles Ctrl-C."""
    listening = bool(_previous)
    global _pipe
    if _pipe is not None:
        signal.set_wakeup_fd(-1)
        for end in _pipe:
            os.close(end)
        _pipe = None
    restore_handlers()
    if listening:
        signal.signal(signal.SIGINT, signal.SIG_IGN)


os.register_at_fork(after_in_child=_reset_in_child)
