"""Check the configuration of a job for its number of processes, before the job starts anything, and print its folders.

    eval "$(python -m megalong.slurm.job 256 run.yaml optimizer.lr=1e-5)"

The output is shell assignments: `run_dir` (of all stages together), `run_dirs` (of each), `preflight`. A mistake, or
missing weights or data, gives one line on stderr and status 2, before any other node does anything.
"""

from __future__ import annotations

import os
import shlex
import sys
from pathlib import Path

from megalong.config.checks import check_world
from megalong.config.load import load_config
from megalong.config.schema import Config
from megalong.errors import UserError
from megalong.slurm.inputs import Seen, missing_inputs

NAMED = 3  # maximum number of missing inputs in one message


def run_folder(stages: list[Config]) -> Path:
    """The folder of a run: that of its only stage, or the one that contains its stages."""
    folder = Path(stages[0].run.dir)
    return folder if len(stages) == 1 else folder.parent


def checked(config: str, overrides: list[str], world: int) -> list[Config]:
    """The stages of a configuration that `world` processes can run.

    Raises:
        UserError: the configuration is wrong, or does not fit that many processes.
    """
    stages = load_config(config, overrides)
    for stage in stages:
        check_world(stage, world)
    return stages


def missing_of(stages: list[Config], made: list[str], seen: Seen = str) -> list[str]:
    """The missing inputs of `stages`. Their run folders are added to `made`, the run folders of earlier jobs."""
    found = []
    for stage in stages:
        found += missing_inputs(stage, made, seen)
        made.append(stage.run.dir)
    return found


def refuse_missing(missing: list[str], where: str) -> None:
    """Refuse to run without its inputs.

    Raises:
        UserError: inputs are missing; the first few are named.
    """
    if missing:
        more = f"; and {len(missing) - NAMED} more" if len(missing) > NAMED else ""
        raise UserError(
            f"{where}: {'; '.join(missing[:NAMED])}{more}. The job runs in {os.getcwd()}: put it there, or write the "
            "right path"
        )


def assignments(stages: list[Config]) -> str:
    """The output, for bash's `eval`."""
    dirs = " ".join(shlex.quote(stage.run.dir) for stage in stages)
    preflight = str(stages[0].slurm.preflight).lower()
    return f"run_dir={shlex.quote(str(run_folder(stages)))}\nrun_dirs=({dirs})\npreflight={preflight}\n"


def main(words: list[str]) -> int:
    """Run for the arguments `WORLD CONFIG [section.key=value …]`; returns the exit status."""
    try:
        stages = checked(words[1], words[2:], int(words[0]))
        refuse_missing(missing_of(stages, []), words[1])
        print(assignments(stages), end="")
    except UserError as error:
        print(f"megalong: error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
