"""Whole runs over two hosts, by torchrun and by `slurm/pretrain.sbatch` under a false SLURM.

The losses are those of one process to a millionth, as far as sums in another order go, and those of two ranks on one
host to the last bit.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

from megalong.checkpoint.folder import find_checkpoint, read_meta
from megalong.training import events
from tests.network.false_slurm import JOB, ROOT, submit
from tests.network.hosts import LINK, NAMES, Hosts
from tests.network.runs import PORT, STEPS, Run, end
from tests.ranks import finish, start_ranks

ENVIRONMENT = {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}


@pytest.fixture(scope="module")
def alone(sources: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> Run:
    """One process."""
    run = Run(tmp_path_factory.mktemp("alone"), sources)
    assert finish(start_ranks(["train", str(run.config)], 1, run.log)) == [0], run.told()
    return run


def torchrun(hosts: Hosts, run: Run, *options: str) -> list[int]:
    """Start it on both hosts; the two statuses."""
    started = []
    for node, name in enumerate(NAMES):
        words = ["-m", "torch.distributed.run", "--nnodes=2", "--nproc-per-node=1", *options]
        if "--rdzv-backend=c10d" not in options:
            words += [f"--node-rank={node}", "--master-addr=a", f"--master-port={PORT}"]
        words += ["-m", "megalong", "train", str(run.config)]
        started.append(hosts.start(name, [sys.executable, *words], run.log, **ENVIRONMENT))
    return end(started)


def is_as_on_one_host(run: Run, unbroken: Run, alone: Run) -> None:
    """It went to its end over the link, and learnt what the others learnt."""
    assert f"network: interface to the other hosts: {LINK} on a, b\n" in run.told()
    curves = run.curves()
    assert [step for step, _ in curves["loss/train"]] == list(range(1, STEPS + 1))
    assert curves == unbroken.curves()
    for name, points in alone.curves().items():
        assert [value for _, value in curves[name]] == pytest.approx([value for _, value in points], rel=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize(
    "options",
    [(), ("--rdzv-backend=c10d", f"--rdzv-endpoint=a:{PORT}", "--rdzv-id=test")],
    ids=["static", "c10d"],
)
def test_torchrun(
    hosts: Hosts, sources: tuple[Path, Path], unbroken: Run, alone: Run, options: Sequence[str], tmp_path: Path
) -> None:
    run = Run(tmp_path, sources)
    assert torchrun(hosts, run, *options) == [0, 0], run.told()
    is_as_on_one_host(run, unbroken, alone)


@pytest.fixture
def named(hosts: Hosts) -> Iterator[Hosts]:
    """The hosts, whose names a test may lead elsewhere."""
    yield hosts
    hosts.resolve()


@pytest.mark.slow
def test_sbatch(hosts: Hosts, sources: tuple[Path, Path], unbroken: Run, alone: Run, tmp_path: Path) -> None:
    """The nodes are checked over the same link first; every rank has a log of its own."""
    run = Run(tmp_path, sources)
    assert end([submit(hosts, run, "pretrain.sbatch")]) == [0], run.told()
    told = run.log.read_text()
    assert f"2 nodes x 1 processes, first a:{20000 + int(JOB)}; logs: {run.run}/logs/{JOB}\n" in told
    assert "preflight: 2 nodes, 2 processes: fit for test\n" in told
    assert told.endswith(" done\n")
    assert sorted(file.name for file in run.run.glob(f"logs/{JOB}/rank-*.log")) == ["rank-0.log", "rank-1.log"]
    is_as_on_one_host(run, unbroken, alone)


@pytest.mark.slow
def test_sbatch_where_names_lead_nowhere(
    named: Hosts, sources: tuple[Path, Path], unbroken: Run, alone: Run, tmp_path: Path
) -> None:
    """SLURM knows the nodes' addresses."""
    named.resolve("nothing")
    run = Run(tmp_path, sources)
    assert end([submit(named, run, "pretrain.sbatch", PREFLIGHT="0")]) == [0], run.told()
    assert f", first {named.addresses['a']}:{20000 + int(JOB)};" in run.log.read_text()
    is_as_on_one_host(run, unbroken, alone)


@pytest.mark.slow
def test_a_link_that_is_cut_under_sbatch(
    hosts: Hosts, sources: tuple[Path, Path], unbroken: Run, alone: Run, tmp_path: Path
) -> None:
    """The job ends, its output says which host is gone, and the same job resumes."""
    run = Run(tmp_path, sources, runtime={"timeout_minutes": 1.0, "watchdog_minutes": 0.1})
    job = submit(hosts, run, "pretrain.sbatch", PREFLIGHT="0", TEST_PAUSE="step 3")
    try:
        run.reaches_pause()
        run.has_saved(2)
        hosts.cut("b")
        run.go_on()
        (status,) = end([job], 90)
        assert status == 1, run.told()
    finally:
        end([job], 0)
        hosts.mend("b")
    told = run.log.read_text()
    assert "training ended with status 1; the end of " in told
    assert "rank 0: no answer from host b (rank 1): it is down, or the network between it and a\n" in told
    assert read_meta(find_checkpoint(run.run)).step == 2
    assert end([submit(hosts, run, "pretrain.sbatch", PREFLIGHT="0")]) == [0], run.told()
    assert ("resume", 2) in [(event["kind"], event["step"]) for event in events.read(run.run)]
    is_as_on_one_host(run, unbroken, alone)
