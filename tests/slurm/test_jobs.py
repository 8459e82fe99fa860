"""The project's own sbatch files under a real SLURM of two nodes: broken in every way a cluster breaks jobs, and whole.

A run that SLURM has stopped and started again must be the run that nobody touched: each loss and gradient norm of its
curve, in TensorBoard's float32.
"""

from __future__ import annotations

import os
import random
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from megalong.checkpoint.folder import find_checkpoint, read_meta, verify, whole_checkpoints
from tests.slurm.cluster import Cluster
from tests.slurm.conftest import write_run
from tests.slurm.jobs import OPTIONS, Jobs

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

# SLURM looks at time limits every 30 s and counts that in: where less than 130 s are left, this signal comes within
# 30 s. A run that would take 40 s by itself is therefore hit once its limit is cut after its first step.
LIMIT = ("--time=30", "--signal=B:USR1@100")
SECONDS = 40
# As many steps as these seconds hold, and the losses of any number of steps begin alike.
ENDLESS = {"training": {"train_iters": 40_000}, "optimizer": {"lr": 1e-3, "lr_schedule": "constant"}}


@pytest.fixture(scope="module")
def jobs(cluster: Cluster, environment: dict[str, str], sources: Path) -> Jobs:
    return Jobs(cluster, environment, sources)


@pytest.fixture(scope="module")
def unbroken(sources: Path) -> Path:
    """The folder of a run in one piece: two local processes, no SLURM, ended by the test after `SECONDS` of steps."""
    config, run = write_run(sources, "unbroken", **ENDLESS), sources / "unbroken"
    command = [sys.executable, "-m", "megalong", "train", str(config), "--nproc", "2"]
    with (sources / "unbroken.out").open("w") as output:
        process = subprocess.Popen(command, env={**os.environ, "OMP_NUM_THREADS": "1"}, stdout=output, stderr=output)
    try:
        assert until(lambda: (run / "log.txt").exists() and " step 1/" in (run / "log.txt").read_text(), 120)
        time.sleep(SECONDS)
        process.terminate()
        assert process.wait(60) == 0
    finally:
        process.kill()
    return run


def steps_of(run: Path) -> int:
    return read_meta(find_checkpoint(run)).step


def broken_run(jobs: Jobs, name: str, unbroken: Path, **sections: dict[str, int]) -> Path:
    """The configuration of a run as long as `unbroken`."""
    training = {"train_iters": steps_of(unbroken)}
    return write_run(jobs.sources, name, **{**ENDLESS, "training": training, **sections})


def curve(run: Path, name: str) -> list[tuple[int, float]]:
    accumulator = EventAccumulator(str(run / "tensorboard"), size_guidance={"scalars": 0})
    accumulator.Reload()
    return [(point.step, point.value) for point in accumulator.Scalars(name)]


def assert_same_run(run: Path, other: Path) -> None:
    steps = steps_of(other)
    for name in ("loss/train", "schedule/gradient_norm"):
        found = curve(run, name)
        assert [step for step, _ in found] == list(range(1, steps + 1))
        assert found == curve(other, name)
    assert verify(find_checkpoint(run)) == []
    assert steps_of(run) == steps


def processes_of(config: Path) -> list[str]:
    """Command lines of all processes that work for a configuration."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            line = (folder / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
        except OSError:
            continue
        if str(config) in line and int(folder.name) != os.getpid():
            found.append(line)
    return found


def until(happened: Callable[[], object], seconds: float) -> bool:
    deadline = time.monotonic() + seconds
    while not happened() and time.monotonic() < deadline:
        time.sleep(0.3)
    return bool(happened())


def test_a_run_goes_on_after_its_time_limit(jobs: Jobs, unbroken: Path) -> None:
    """Submit, signal before the limit, save, requeue, resume, finish."""

    def limit_to(minutes: int) -> None:
        jobs.cluster.run("scontrol", "update", f"JobId={job}", f"TimeLimit={minutes}")

    run = jobs.sources / "limited"
    config = broken_run(jobs, "limited", unbroken)
    submitted = time.monotonic()
    job = jobs.submit("pretrain.sbatch", str(config), options=(*OPTIONS, *LIMIT))
    log = run / "logs" / job / "rank-0.log"
    assert until(lambda: log.exists() and " step 1/" in log.read_text(), 150), jobs.told()
    limit_to(int((time.monotonic() - submitted) / 60) + 2)  # one to two minutes are left
    assert until(lambda: jobs.cluster.restarts(job), 100), jobs.told()
    # Once is enough: on a slow machine the next signal would come before the second start has got anywhere.
    limit_to(30)
    jobs.finish(job, seconds=240)
    told = "".join(file.read_text() for file in jobs.sources.glob(f"pretrain-{job}-*.out"))
    assert told.count("SIGUSR1: the ranks save and exit") >= 1, (
        f"the run ended before its signal: raise SECONDS\n{told}"
    )
    assert told.count("saved; requeued") == jobs.cluster.restarts(job) >= 1
    assert not (run / "REQUEUE").exists()
    assert "resumed from" in log.read_text(), log.read_text()[-2000:]
    assert (run / "logs" / job / "rank-1.log").exists()
    assert_same_run(run, unbroken)
    assert not processes_of(config)


def test_requeue_and_cancel_at_random_moments_lose_nothing(jobs: Jobs, unbroken: Path) -> None:
    seed = time.time_ns() % 10000
    print("seed", seed)
    moments = random.Random(seed)
    run = jobs.sources / "broken"
    config = broken_run(jobs, "broken", unbroken, checkpoint={"save_interval": 50, "keep_last": 2})
    job = jobs.submit("pretrain.sbatch", str(config))
    for action in (("scontrol", "requeue"), ("scancel",)):
        jobs.cluster.wait(job, "RUNNING", seconds=60)
        time.sleep(moments.uniform(1, 25))
        before = [path.name for path in whole_checkpoints(run)]
        jobs.cluster.run(*action, job)
        assert until(lambda: jobs.cluster.state(job) in ("PENDING", "CANCELLED"), 30), jobs.told()
        assert until(lambda: not processes_of(config), 30), processes_of(config)
        after = [path.name for path in whole_checkpoints(run)]
        assert after[-1:] >= before[-1:]
        for path in whole_checkpoints(run):
            assert verify(path) == []
    # What was cancelled stays cancelled, whatever marker its ranks have left.
    assert jobs.cluster.state(job) == "CANCELLED"
    assert jobs.cluster.restarts(job) == 1
    again = jobs.submit("pretrain.sbatch", str(config))
    jobs.finish(again)
    assert_same_run(run, unbroken)
    assert not processes_of(config)
