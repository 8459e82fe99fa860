"""`slurm`: the resources that `megalong slurm` requests, and how its jobs end and restart.

SLURM signals the job before the time limit; the job saves and requeues itself. It reacts to the signal between two
steps, so the lead must be longer than a step and a save: a 4M-token step of UltraLong's layout lasts five minutes.
"""

from __future__ import annotations

import re
from typing import Annotated, Self

from pydantic import Field, StringConstraints, model_validator

from megalong.config.section import Section

# These are written to #SBATCH lines, where a space or a quote would start another option.
Word = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9_.,:@+=/-]+$")]
Time = Annotated[str, StringConstraints(pattern=r"^(\d+-\d{1,2}(:\d{1,2}){0,2}|\d+(:\d{1,2}){0,2})$")]
Option = Annotated[str, StringConstraints(pattern=r"^--[a-z][a-z-]*(=[^\n]*)?$")]
Text = Annotated[str, StringConstraints(min_length=1, pattern=r"^[^\n]*$")]


class Slurm(Section):
    """Resources of a job and how it ends."""

    partition: Word | None = None
    """SLURM partition. Example: `batch`"""
    account: Word | None = None
    """SLURM account. Example: `research`"""
    qos: Word | None = None
    """SLURM quality of service. Example: `normal`"""
    time: Time = "08:00:00"
    """Time limit in SLURM's format: `minutes`, `hours:minutes:seconds` or `days-hours`."""
    lead_minutes: float = Field(default=20.0, gt=0, le=1092)
    """Minutes before the time limit when SLURM signals the job to save; must be longer than a step and a save."""
    gpus_per_node: int = Field(default=8, ge=0)
    """GPUs per node; 0 trains on CPUs."""
    processes_per_node: int = Field(default=1, ge=1)
    """Processes per node when training on CPUs."""
    cpus_per_node: int = Field(default=64, ge=1)
    """CPU cores per node."""
    container: Text | None = None
    """Container image. Example: `nvcr.io/nvidia/pytorch:25.10-py3`"""
    container_mounts: Text | None = None
    """Mounts of the container; must include the checkout and the run folder. Example: `/data:/data`"""
    options: tuple[Option, ...] = Field((), strict=False)
    """Further `#SBATCH` lines. Example: `["--constraint=h100"]`"""
    preflight: bool = True
    """Check the nodes before training."""
    min_gb_per_s: float | None = Field(default=None, gt=0)
    """Refuse a network slower than this (GB/s from one GPU to the next node); default: half of the other nodes' rate.
    Example: `20.0`
    """

    @property
    def ranks_per_node(self) -> int:
        """Processes that torchrun starts on a node."""
        return self.gpus_per_node or self.processes_per_node

    @model_validator(mode="after")
    def _agrees(self) -> Self:
        if self.lead_minutes * 60 >= seconds(self.time):
            raise ValueError(
                f"lead_minutes {self.lead_minutes:g} is not below time {self.time}: the job would save and end as soon "
                "as it starts; write a longer time or a shorter lead"
            )
        if self.container_mounts is not None and self.container is None:
            raise ValueError(f"container_mounts {self.container_mounts} without container: name the image, or drop it")
        return self


def seconds(time: str) -> int:
    """SLURM's `minutes`, `minutes:seconds`, `hours:minutes:seconds`, `days-hours[:minutes[:seconds]]` in seconds."""
    days, dash, rest = time.rpartition("-")
    numbers = [int(number) for number in re.findall(r"\d+", rest)]
    if dash:
        hours, minutes, last = [*numbers, 0, 0][:3]
        return ((int(days) * 24 + hours) * 60 + minutes) * 60 + last
    if len(numbers) == 3:
        return (numbers[0] * 60 + numbers[1]) * 60 + numbers[2]
    return numbers[0] * 60 + (numbers[1] if len(numbers) == 2 else 0)
