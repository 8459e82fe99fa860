"""How commands are declared: the parser of all commands, and options that several of them have.

`command` adds a command with its help and the function that runs it; `group` adds a group such as `data …`.
"""

import argparse
import difflib
import os
import sys
import time
from collections.abc import Callable
from typing import Any, NoReturn

from megalong.errors import Speaker

SPEAKER_SECONDS = 30.0  # how long the other processes wait for the speaker


def print_error(message: str, speaker: Speaker = "world") -> None:
    """Print a user's mistake if this process is (one of) the `speaker`; see `UserError.speaker`.

    Under torchrun the other processes wait: torchrun ends all processes of a node when one of them ends, and the
    speaker may still be importing torch.
    """
    variable = {"world": "RANK", "node": "LOCAL_RANK"}.get(speaker)
    if variable is None or os.environ.get(variable, "0") == "0":
        print(f"megalong: error: {message}", file=sys.stderr, flush=True)
    elif "TORCHELASTIC_RUN_ID" in os.environ:
        time.sleep(SPEAKER_SECONDS)


class Formatter(argparse.HelpFormatter):
    """Help in two columns; the first has room for our longest command."""

    def __init__(self, prog: str) -> None:
        super().__init__(prog, max_help_position=30)
        self._action_max_length = 14  # argparse does not count the indentation of commands


class Parser(argparse.ArgumentParser):
    """argparse with one-line errors, suggestions for misspelled commands and options, and no abbreviations."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(allow_abbrev=False, formatter_class=Formatter, **settings)

    def error(self, message: str) -> NoReturn:
        print_error(f"{message} (see {self.prog} --help)")
        sys.exit(2)

    def _check_value(self, action: argparse.Action, value: Any) -> None:
        if isinstance(action, argparse._SubParsersAction) and value not in action.choices:
            self.error(f"unknown command {value}; {nearest(value, list(action.choices))}")
        super()._check_value(action, value)

    def options(self) -> list[str]:
        """Every option of this command."""
        return [option for action in self._actions for option in action.option_strings]


def nearest(word: str, known: list[str]) -> str:
    near = difflib.get_close_matches(word, known, n=1)
    return f"did you mean {near[0]}?" if near else f"known: {', '.join(known)}"


def command(
    commands: Any, name: str, summary: str, run: Callable[[argparse.Namespace], int]
) -> argparse.ArgumentParser:
    parser: argparse.ArgumentParser = commands.add_parser(
        name, help=summary, description=f"{summary[0].upper()}{summary[1:]}."
    )
    parser.set_defaults(run=run, parser=parser)
    return parser


def group(commands: Any, name: str, summary: str) -> Any:
    return commands.add_parser(name, help=summary, description=summary).add_subparsers(
        metavar="COMMAND", required=True, parser_class=Parser
    )


def count(text: str) -> int:
    """A whole number of at least 1."""
    try:
        number = int(text)
    except ValueError:
        number = 0
    if number < 1:
        raise argparse.ArgumentTypeError(f"{text} is not a whole number of at least 1")
    return number


def step(text: str) -> int:
    """A whole number of at least 0: an imported checkpoint is step 0."""
    return 0 if text == "0" else count(text)


def add_dtype(parser: argparse.ArgumentParser, what: str = "type to compute in") -> None:
    parser.add_argument("--dtype", choices=["float32", "bfloat16", "float16"], help=f"{what} (default: as trained)")


def add_overwrite(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--overwrite", action="store_true", help="replace existing files")


def add_config(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("config", metavar="CONFIG.yaml", help="configuration of the run")
    parser.add_argument("overrides", nargs="*", default=[], metavar="section.key=value", help="overrides the file")
