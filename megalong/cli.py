"""The command line: its commands, and the function that runs each of them.

In `commands/`, an `add_...` function declares a command, and a `_run_...` function runs it and imports what it needs
when called. So `megalong --help` and `megalong data ...` start without torch, and a broken optional package breaks only
the command that uses it.

Exit status: 0 success; 2 a user's mistake, printed in one line (under torchrun by one process, see
`UserError.speaker`); 130 interrupted by Ctrl-C, printed in one line; 1 a bug, with its traceback.
"""

import argparse
import errno
import os
import select
import sys
from collections.abc import Sequence

from megalong import __version__
from megalong.commands import checkpoint, data, evaluate, generate, run, slurm
from megalong.commands.parsing import Parser, nearest, print_error
from megalong.errors import UserError
from megalong.runtime import signals
from megalong.runtime.gpus import set_environment

_STDOUT = 1
_FULL, _DENIED = (errno.ENOSPC, errno.EDQUOT, errno.EROFS), (errno.EACCES, errno.EPERM)
# OS errors that are reported as user errors; without a file name, a denied access is a bug of ours.
_FIXES = dict.fromkeys(_FULL, "make room there, or write elsewhere") | dict.fromkeys(
    _DENIED, "let this user read and write there, or give another path"
)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command (None: from `sys.argv`) and return its exit status."""
    set_environment()
    with signals.interruptible() as interrupted:
        try:
            return _run_command(arguments)
        except BaseException as error:
            if not (interrupted() or isinstance(error, KeyboardInterrupt)):
                raise
            why = f": {error}" if isinstance(error, KeyboardInterrupt) and error.args else ""
            signals.print_line(f"megalong: interrupted{why}")
            return signals.STATUS


def _run_command(arguments: Sequence[str] | None) -> int:
    try:
        options = _parse(arguments)
        status: int = options.run(options)
        sys.stdout.flush()
    except UserError as error:
        print_error(str(error), error.speaker)
        return 2
    except BrokenPipeError:
        if not _reader_is_gone():
            raise
        return 1
    except OSError as error:
        fix = _FIXES.get(error.errno or 0)
        if fix is None or (error.errno in _DENIED and error.filename is None):
            raise
        print_error(f"{error.filename or 'output'}: {error.strerror}; {fix}")
        return 2
    except (MemoryError, RuntimeError) as error:
        out_of_memory = _out_of_memory(error)
        if out_of_memory is None:
            raise
        print_error(f"{out_of_memory}; use a shorter length, a smaller batch, or more processes", speaker="rank")
        return 2
    return status


def _out_of_memory(error: MemoryError | RuntimeError) -> str | None:
    """numpy's or torch's out-of-memory message; None for any other error."""
    message = " ".join(str(error).split())
    if isinstance(error, MemoryError):
        return f"out of memory: {message}" if message else "out of memory"
    _, found, reason = message.partition("DefaultCPUAllocator: can't allocate memory: ")
    return f"out of memory: {reason.partition('.')[0]}" if found else None


def _reader_is_gone() -> bool:
    """Whether stdout is the broken pipe (`| head`), not a pipe between processes; if so, discard further output."""
    poll = select.poll()
    poll.register(_STDOUT, 0)
    if not poll.poll(0):
        return False
    os.dup2(os.open(os.devnull, os.O_WRONLY), _STDOUT)
    return True


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    options, rest = build_parser().parse_known_args(arguments)
    # argparse does not accept positional arguments after an option: `train run.yaml --nproc 2 optimizer.lr=1e-4`.
    if "overrides" in options:
        options.overrides = [*options.overrides, *(word for word in rest if not word.startswith("-"))]
        rest = [word for word in rest if word.startswith("-")]
    if rest:
        name = rest[0].partition("=")[0]
        hint = nearest(name, options.parser.options()) if name.startswith("-") else "one argument too many"
        options.parser.error(f"unknown argument {rest[0]}; {hint}")
    return options


def build_parser() -> argparse.ArgumentParser:
    """The whole command line; a test pins its commands and options."""
    parser = Parser(prog="megalong", description="Long-context training of Llama models in 3D parallel.")
    parser.add_argument("--version", action="version", version=f"megalong {__version__}")
    commands = parser.add_subparsers(metavar="COMMAND", required=True, parser_class=Parser)
    run.add_quickstart(commands)
    data.add_data(commands)
    checkpoint.add_checkpoint(commands)
    checkpoint.add_import(commands, "import-hf")
    checkpoint.add_export(commands, "export-hf")
    run.add_train(commands)
    evaluate.add_evaluate(commands)
    generate.add_generate(commands)
    slurm.add_slurm(commands)
    slurm.add_preflight(commands)
    run.add_doctor(commands)
    return parser
