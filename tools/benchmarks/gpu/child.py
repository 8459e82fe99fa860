"""A process with a time limit that reports as it goes: a line of JSON at a time, through a pipe of its own.

What hangs or breaks its CUDA context so takes down itself alone, and what it had found until then is kept. Its standard
output is left for what libraries print.
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
    """Run `command`, to whose arguments the descriptor to report to is added.

    Args:
        limit: seconds after which it and all processes it has started are killed.
        on_line: gets every report while the child runs, in a thread of this process.
        output: where its standard output and error go.

    Returns:
        Its exit status, TIMED_OUT where it was killed.
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
    """The child and whatever it left behind; the pipe is closed when none of them lives."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(child.pid, signal.SIGKILL)
    child.wait()


def _read(descriptor: int, on_line: Callable[[Line], None]) -> None:
    with os.fdopen(descriptor) as lines:
        for line in lines:
            if line.endswith("\n"):  # a killed child may have got half a line out
                on_line(json.loads(line))


def reporter(descriptor: int) -> Callable[[Line], None]:
    """In the child: what sends a report at once."""
    os.set_inheritable(descriptor, False)
    pipe = os.fdopen(descriptor, "w")

    def report(line: Line) -> None:
        print(json.dumps(line), file=pipe, flush=True)

    return report


def python(module_or_file: Sequence[str]) -> list[str]:
    """This interpreter with output that is not held back."""
    return [sys.executable, "-u", *module_or_file]
