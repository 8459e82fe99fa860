"""`megalong quickstart`, `train` and `doctor`."""

import argparse
from typing import Any

from megalong.commands.parsing import add_config, command, count


def add_quickstart(commands: Any) -> None:
    parser = command(commands, "quickstart", "the whole pipeline on this machine's own text, on CPU", _run_quickstart)
    parser.add_argument("--output", default="quickstart-run", metavar="DIR", help="folder for all files (%(default)s)")


def _run_quickstart(options: argparse.Namespace) -> int:
    from megalong.quickstart import quickstart

    quickstart(output=options.output)
    return 0


def add_train(commands: Any) -> None:
    parser = command(commands, "train", "start or resume the training run of a configuration", _run_train)
    add_config(parser)
    parser.add_argument("--nproc", type=count, metavar="N", help="start N local processes; not under torchrun")


def _run_train(options: argparse.Namespace) -> int:
    from megalong.training.launch import train

    return train(options.config, options.overrides, nproc=options.nproc)


def add_doctor(commands: Any) -> None:
    command(commands, "doctor", "show what is installed and what a run will use", _run_doctor)


def _run_doctor(options: argparse.Namespace) -> int:
    from megalong.cluster.doctor import doctor

    doctor()
    return 0
