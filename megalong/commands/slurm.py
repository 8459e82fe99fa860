"""`megalong slurm` and `megalong preflight`: jobs for a cluster, and checks of its nodes."""

import argparse
from typing import Any

from megalong.commands.parsing import add_config, command, count


def add_slurm(commands: Any) -> None:
    parser = command(commands, "slurm", "print or submit the SLURM job of a configuration", _run_slurm)
    add_config(parser)
    parser.add_argument("--nodes", type=count, required=True, metavar="N", help="nodes of slurm.gpus_per_node GPUs")
    parser.add_argument("--submit", action="store_true", help="call sbatch; otherwise the script is printed")
    parser.add_argument(
        "--chain", nargs="+", default=[], metavar="SFT.yaml", help="runs that follow, one after another, and an export"
    )
    parser.add_argument("--output", metavar="DIR", help="folder of the final export (default: RUN/hf of the last run)")


def _run_slurm(options: argparse.Namespace) -> int:
    from megalong.slurm.chain import slurm

    slurm(
        options.config,
        options.overrides,
        options.nodes,
        submit=options.submit,
        chain=options.chain,
        output=options.output,
    )
    return 0


def add_preflight(commands: Any) -> None:
    parser = command(commands, "preflight", "check the nodes of a job before training; started by srun", _run_preflight)
    add_config(parser)


def _run_preflight(options: argparse.Namespace) -> int:
    from megalong.training.preflight import preflight

    return preflight(options.config, options.overrides)
