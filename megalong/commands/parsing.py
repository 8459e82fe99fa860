"""How commands are declared: the parser all of them share, and what several of them ask for.

`command` gives a command its help and the function that answers it; `group` opens a family such as `data …`.
"""

import argparse
import difflib
import os
import sys
import time
from collections.abc import Callable
from typing import Any, NoReturn

from megalong.errors import Speaker

SPEAKER_SECONDS = 30.0  # that others wait for it


def print_error(message: str, speaker: Speaker = "world") -> None:
    """Print a user's mistake, if this process is the one (or one of those) that shall; see `UserError.speaker`.

    Under torchrun the others wait: it ends all processes of a node as soon as one of them has ended, and the one that
    shall speak may still be importing torch.
    """
    variable = {"world": "RANK", "node": "LOCAL_RANK"}.get(speaker)
    if variable is None or os.environ.get(variable, "0") == "0":
        print(f"megalong: error: {message}", file=sys.stderr, flush=True)
    elif "TORCHELASTIC_RUN_ID" in os.environ:
        time.sleep(SPEAKER_SECONDS)


class Formatter(argparse.HelpFormatter):
    """Help in two columns, with room for our longest command in the first."""

    def __init__(self, prog: str) -> None:
        super().__init__(prog, max_help_position=30)
        self._action_max_length = 14  # argparse measures commands without the indentation it gives them


class Parser(argparse.ArgumentParser):
    """argparse with one-line errors, the nearest right command or option, and no abbreviations."""

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
        """Every option this command knows."""
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
    parser.add_argument(
        "--dtype", choices=["float32", "bfloat16", "float16"], help=f"{what}; as trained where not given"
    )


def add_overwrite(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--overwrite", action="store_true", help="write over what is there")


def add_config(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("config", metavar="CONFIG.yaml", help="the run, section by section")
    parser.add_argument("overrides", nargs="*", default=[], metavar="section.key=value", help="instead of the file's")
