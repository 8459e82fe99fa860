"""Steps that can be stopped and resumed.

A step knows whether its result exists (`done`) and how to make it (`run`). A result is complete or absent, so an
interrupted step is run again; training resumes from its last checkpoint.

Work that has a command is done by that command, in its own process, exactly as printed: a user can copy the printed
commands and run them.
"""

from __future__ import annotations

import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import megalong
from megalong.runtime.amounts import duration
from megalong.runtime.signals import PASSED_ON

WIDTH = 100
GRACE_SECONDS = 30.0


class StepFailed(SystemExit):
    """A command failed and has printed the reason. Carries its exit status."""


@dataclass(frozen=True)
class Step:
    """One step: its title, its purpose, whether it is done, and how to do it."""

    title: str
    purpose: str
    done: Callable[[], bool]
    run: Callable[[], None]


def run_steps(steps: list[Step]) -> dict[str, float]:
    """Run the steps that are not done yet, with a header and a time for each; returns seconds by title."""
    begin, seconds = time.monotonic(), {}
    for number, step in enumerate(steps, start=1):
        head = f"━━ {number}/{len(steps)} {step.title} "
        print(f"\n{head}{'━' * max(0, WIDTH - len(head))}")
        if step.done():
            print("   done before")
            continue
        print(f"   {step.purpose}")
        started = time.monotonic()
        step.run()
        seconds[step.title] = time.monotonic() - started
        so_far = duration(time.monotonic() - begin)
        print(f"   {duration(seconds[step.title])}, {so_far} since the start")
    return seconds


class Commands:
    """Runs `megalong …` in `folder` and prints each command."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def __call__(self, *arguments: str, output: Path | None = None) -> None:
        """Run `megalong ARGUMENTS` to its end; its stdout goes to the file `output` if that is given.

        Raises:
            StepFailed: with the command's exit status; the command has printed the reason.
        """
        print(f"   $ megalong {shlex.join(arguments)}")
        command = [sys.executable, "-m", "megalong", *arguments]
        with output.open("wb") if output is not None else nullcontext() as stdout:
            status = _run(command, self._folder, stdout)
        if status:
            print(f"   stopped: exit status {status}; run the same command again to resume here", file=sys.stderr)
            raise StepFailed(status if status > 0 else 128 - status)


def _run(command: list[str], folder: Path, stdout: IO[bytes] | None = None) -> int:
    """Exit status of `command`. An interrupt is passed on to it, and its end is awaited, so that it does not run on."""
    with subprocess.Popen(command, cwd=folder, env=_environment(), stdout=stdout) as process:
        try:
            return process.wait()
        except BaseException:
            process.send_signal(signal.SIGINT)
            try:
                process.wait(GRACE_SECONDS)
            except subprocess.TimeoutExpired:
                process.kill()
            raise


def _environment() -> dict[str, str]:
    """The caller's environment, with this package on the path and without GPUs: the quickstart runs on CPU."""
    root = str(Path(megalong.__file__).resolve().parents[1])
    paths = [root, *filter(None, [os.environ.get("PYTHONPATH")])]
    own = {"PYTHONPATH": os.pathsep.join(paths), "CUDA_VISIBLE_DEVICES": "", PASSED_ON: "1"}
    return {**os.environ, **own}
