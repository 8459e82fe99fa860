"""A chain of jobs: pretrain → SFT … → export; each job starts when the one before has succeeded (`afterok`).

A job that saves and requeues itself keeps its number and has not ended, so the next job continues to wait. All
configurations are checked before the first job is submitted: a mistake in the last must not show after days. So are the
weights and data that they name, as far as this machine sees them: missing ones are reported, and nothing is submitted.
"""

from __future__ import annotations

import shlex
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from megalong.config.load import load_config
from megalong.errors import UserError
from megalong.slurm.inputs import seen_from_here
from megalong.slurm.job import missing_of, refuse_missing
from megalong.slurm.script import Job, export_job, training_job

_END = "END_OF_MEGALONG_JOB"


def slurm(
    config: str,
    overrides: Sequence[str],
    nodes: int,
    submit: bool = False,
    chain: Sequence[str] = (),
    output: str | None = None,
) -> None:
    """Print or submit the jobs of `config` and of `chain`.

    Args:
        overrides: `section.key=value`, only for `config`.
        nodes: of every training job.
        chain: further configurations, each starting from the run before; an export follows the last one.
        output: the export's folder, also after a single run; None: `hf` in the last run's folder.

    Raises:
        UserError: a configuration is wrong, does not fit, or does not start from the run before it; there is no SLURM
            here; or inputs of a job to submit are missing.
    """
    jobs = [training_job(config, overrides, nodes)]
    last, last_overrides = config, list(overrides)
    for following in chain:
        _refuse_other_start(following, jobs[-1].result)
        jobs.append(training_job(following, (), nodes))
        last, last_overrides = following, []
    if chain or output is not None:
        result = jobs[-1].result
        jobs.append(export_job(last, last_overrides, result, Path(output) if output else result / "hf"))
    missing, waits = _missing(jobs), any(_waits(job) for job in jobs)
    if submit and not waits:
        refuse_missing(missing, "--submit")
    for line in missing:
        print(f"megalong: warning: {line}; the job fails at its start if it is still missing then", file=sys.stderr)
    if submit:
        _submit(jobs)
    else:
        print(jobs[0].script if len(jobs) == 1 else _driver(jobs), end="")


def _missing(jobs: Sequence[Job]) -> list[str]:
    """Inputs of the jobs that do not exist and that no earlier job makes, as far as this machine sees."""
    made: list[str] = []
    return [
        line for job in jobs if job.stages for line in missing_of(list(job.stages), made, seen_from_here(job.stages[0]))
    ]


def _waits(job: Job) -> bool:
    """Whether its configuration makes it wait for another job, which may make its inputs."""
    return any(option.startswith("--dependency") for stage in job.stages for option in stage.slurm.options)


def _refuse_other_start(config: str, previous: Path) -> None:
    load = load_config(config)[0].model.load
    found = Path(load.checkpoint) if load is not None and load.checkpoint is not None else None
    if found is None or (found != previous and previous not in found.parents):
        start = found if found is not None else "something else"
        raise UserError(
            f"--chain {config}: it starts from {start}, but the run before it ends in {previous}; write model: {{load: "
            f"{{checkpoint: {previous}}}}}"
        )


def _driver(jobs: Sequence[Job]) -> str:
    """A shell script that submits the jobs."""
    parts = ["#!/usr/bin/env bash\n# Written by megalong slurm: run it to submit these jobs.\nset -euo pipefail\n"]
    for number, job in enumerate(jobs):
        after = f" --dependency=afterok:$job{number - 1} --kill-on-invalid-dep=yes" if number else ""
        parts.append(f"\njob{number}=$(sbatch --parsable{after} <<'{_END}'\n{job.script}{_END}\n)\n")
        parts.append(f'job{number}=${{job{number}%%;*}}\necho {shlex.quote(job.name)}: job "$job{number}"\n')
    return "".join(parts)


def _submit(jobs: Sequence[Job]) -> None:
    if shutil.which("sbatch") is None:
        raise UserError("--submit: no sbatch on this machine's PATH; leave --submit out to see the script")
    previous: str | None = None
    for job in jobs:
        after = [] if previous is None else [f"--dependency=afterok:{previous}", "--kill-on-invalid-dep=yes"]
        done = subprocess.run(["sbatch", "--parsable", *after], input=job.script, capture_output=True, text=True)
        if done.returncode:
            reason = " ".join(done.stderr.split())
            raise UserError(f"--submit: sbatch refused {job.name}: {reason}")
        previous = done.stdout.strip().split(";")[0]
        print(f"{job.name}: job {previous}")
