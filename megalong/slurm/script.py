"""The sbatch script of one job: its resources come from the configuration, its work from `slurm/common.sh`.

Everything from a configuration or a command line is quoted for the shell that reads it. `config/slurm.py` limits the
values in #SBATCH lines to harmless characters.
"""

from __future__ import annotations

import os
import shlex
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from megalong.config.schema import Config
from megalong.errors import UserError
from megalong.runtime.checkout import root
from megalong.slurm.job import checked, run_folder


@dataclass(frozen=True)
class Job:
    """One job: its name in the queue, its script, the folder of its result, and the stages that it trains."""

    name: str
    script: str
    result: Path
    stages: tuple[Config, ...] = ()


def training_job(config: str, overrides: Sequence[str], nodes: int) -> Job:
    """The job that trains a configuration on `nodes` nodes.

    Raises:
        UserError: the configuration is wrong, or does not fit that many processes.
    """
    first = checked_on(config, list(overrides), nodes)
    settings = first[0].slurm
    gpus = [f"--gpus-per-node={settings.gpus_per_node}"] if settings.gpus_per_node else []
    head = [
        f"--job-name={first[0].run.name}",
        f"--nodes={nodes}",
        "--ntasks-per-node=1",
        *gpus,
        f"--cpus-per-task={settings.cpus_per_node}",
        "--mem=0",
        "--exclusive",
        f"--time={settings.time}",
        f"--signal=B:USR1@{round(settings.lead_minutes * 60)}",
        "--requeue",
        *_placement(first[0]),
    ]
    exports = {"GPUS_PER_NODE": str(settings.gpus_per_node), "PROCESSES_PER_NODE": str(settings.processes_per_node)}
    exports |= {"CONTAINER": settings.container or "", "CONTAINER_MOUNTS": settings.container_mounts or ""}
    ranks = nodes * settings.ranks_per_node
    title = f"{ranks} processes, {first[0].data_parallel_size(ranks)} replicas; run folder {run_folder(first)}"
    work = shlex.join(["train_on_nodes", config, *overrides])
    # The result of a run with stages is in the folder of the last stage.
    return Job(first[0].run.name, _script(title, head, exports, work), Path(first[-1].run.dir), tuple(first))


def export_job(config: str, overrides: Sequence[str], checkpoint: Path, output: Path) -> Job:
    """The job that writes a run's newest checkpoint as a Hugging Face folder."""
    from megalong.config.load import load_config

    stage = load_config(config, list(overrides))[-1]
    cpus = min(8, stage.slurm.cpus_per_node)
    head = [f"--job-name={stage.run.name}-export", "--nodes=1", "--ntasks=1", f"--cpus-per-task={cpus}", "--mem=0"]
    head += ["--time=02:00:00", "--requeue", *_placement(stage)]
    words = ["checkpoint", "export", "--checkpoint", str(checkpoint), "--output", str(output)]
    work = f'srun --cpus-per-task={cpus} "${{container[@]}}" "$python" -m megalong {shlex.join(words)}'
    exports = {"GPUS_PER_NODE": "0", "PROCESSES_PER_NODE": "1", "CONTAINER": stage.slurm.container or ""}
    exports["CONTAINER_MOUNTS"] = stage.slurm.container_mounts or ""
    return Job(f"{stage.run.name}-export", _script(f"{checkpoint} to {output}", head, exports, work), output)


def checked_on(config: str, overrides: list[str], nodes: int) -> list[Config]:
    """The stages of a configuration that `nodes` nodes of `slurm.gpus_per_node` GPUs can run."""
    from megalong.config.load import load_config

    ranks = nodes * load_config(config, overrides)[0].slurm.ranks_per_node
    try:
        return checked(config, overrides, ranks)
    except UserError as error:
        raise UserError(f"{config} on {nodes} nodes: {error}") from None


def _placement(config: Config) -> list[str]:
    settings = config.slurm
    values = {"partition": settings.partition, "account": settings.account, "qos": settings.qos}
    options = [f"--{name}={value}" for name, value in values.items() if value is not None]
    return [*options, *settings.options, "--output=%x-%j.out", "--open-mode=append"]


def _script(title: str, head: Sequence[str], exports: dict[str, str], work: str) -> str:
    common = slurm_folder() / "common.sh"
    lines = ["#!/usr/bin/env bash", f"# Written by megalong slurm: {title}".replace("\n", " ")]
    lines += [f"#SBATCH {option}" for option in head]
    lines += ["", "set -euo pipefail", f"cd -- {shlex.quote(os.getcwd())}"]
    lines += [f"export {name}={shlex.quote(value)}" for name, value in exports.items() if value]
    # The Python of the user who submits the job, else of the one who wrote it; a container has its own Python.
    python = os.environ.get("MEGALONG_PYTHON") or ("python3" if exports["CONTAINER"] else sys.executable)
    lines += [f'[ -n "${{MEGALONG_PYTHON:-}}" ] || MEGALONG_PYTHON={shlex.quote(python)}', "export MEGALONG_PYTHON"]
    lines += [f"source {shlex.quote(str(common))}", work]
    return "\n".join(lines) + "\n"


def slurm_folder() -> Path:
    """The folder of `common.sh`: in the checkout, or where pip installed it.

    Raises:
        UserError: it is in neither.
    """
    places = [root() / "slurm", Path(sys.prefix) / "share" / "megalong" / "slurm"]
    for place in places:
        if (place / "common.sh").is_file():
            return place
    raise UserError(f"slurm/common.sh is in none of {', '.join(map(str, places))}: install megalong from its checkout")
