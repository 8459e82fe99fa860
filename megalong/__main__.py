"""`python -m megalong COMMAND`, so that `torchrun -m megalong train ...` works; also the console script's entry point.

The call is guarded, because checkpoint writers start processes that import this module again.
"""

import os
import signal
import sys
from types import FrameType


def _end(number: int, frame: FrameType | None) -> None:
    """Handle Ctrl-C before the command line is read: there is nothing to clean up."""
    if os.environ.get("LOCAL_RANK", "0") == "0":
        os.write(2, b"megalong: interrupted\n")
    os._exit(130)


def run() -> int:
    """Run `megalong.cli.main`, without a traceback for a Ctrl-C during imports or at exit."""
    ours = signal.getsignal(signal.SIGINT) is signal.default_int_handler
    if ours:
        signal.signal(signal.SIGINT, _end)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})  # our launcher blocks it until here
    from megalong.cli import main

    if ours:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        return main()
    finally:
        if ours:
            signal.signal(signal.SIGINT, signal.SIG_DFL)


if __name__ == "__main__":
    sys.exit(run())
