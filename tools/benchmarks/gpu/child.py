"""A process with a time limit that reports while it runs: lines of JSON through a separate pipe.

A process that hangs or breaks its CUDA context affects only itself, and its earlier reports are kept. Its standard
output stays free for the output of libraries.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Mapping, Sequence
from typing import IO, Any

Line = dict[str, Any]
TIMED_OUT = -signal.SIGKILL


def run_child(
    command: Sequence[str], limit: float, on_line: Callable[[Line], None], output: IO[Any], env: Mapping[str, str]
) -> int:
    """Run `command` with one more argument: the file descriptor for reports.

    Args:
        limit: seconds after which it and all processes that it started are killed.
        on_line: called with every report while the child runs, in a thread of this process.
        output: gets its standard output and error.

    Returns:
        Its exit status; TIMED_OUT if it was killed.
    """
    read, write = os.pipe()
    child = subprocess.Popen(
        [*command, str(write)],
        stdout=output,
        stderr=subprocess.STDOUT,
        pass_fds=[write],
        env=dict(env),
        start_new_session=True,
    )
    os.close(write)
    reader = threading.Thread(target=_read, args=(read, on_line))
    reader.start()
    try:
        status = child.wait(limit)
    except subprocess.TimeoutExpired:
        status = TIMED_OUT
    finally:
        _end_session(child)
        reader.join()
    return status


def _end_session(child: subprocess.Popen[Any]) -> None:
    """Kill the child and all processes that it started; the pipe is closed when all have ended."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(child.pid, signal.SIGKILL)
    child.wait()


def _read(descriptor: int, on_line: Callable[[Line], None]) -> None:
    with os.fdopen(descriptor) as lines:
        for line in lines:
            if line.endswith("\n"):  # a killed child may have written half a line
                on_line(json.loads(line))


def reporter(descriptor: int) -> Callable[[Line], None]:
    """In the child: a function that sends a report at once."""
    os.set_inheritable(descriptor, False)
    pipe = os.fdopen(descriptor, "w")

    def report(line: Line) -> None:
        print(json.dumps(line), file=pipe, flush=True)

    return report


def python(module_or_file: Sequence[str]) -> list[str]:
    """The command to run this interpreter with unbuffered output."""
    return [sys.executable, "-u", *module_or_file]
