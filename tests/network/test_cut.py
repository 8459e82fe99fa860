"""A host that is gone in the middle of a step, or of a save: the run ends by itself, says which, and resumes.

What it then ends with is compared with a run on one host that nothing happened to: each loss and gradient norm of its
curve, in TensorBoard's float32.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from megalong.checkpoint.folder import find_checkpoint, read_meta, verify, whole_checkpoints
from megalong.training import events
from tests.network.hosts import Hosts
from tests.network.runs import Run
from tests.ranks import end_ranks, finish

WATCHDOG = {"timeout_minutes": 1.0, "watchdog_minutes": 0.1}
NO_ANSWER = "no answer from host {0} (rank {1}): it is down, or the network between it and {2}"
B_IS_GONE, A_IS_GONE = NO_ANSWER.format("b", 1, "a"), NO_ANSWER.format("a", 0, "b")


def resumes(run: Run, hosts: Hosts, step: int, unbroken: Run) -> None:
    """The last good checkpoint is that of `step`, and the same command makes of it what was never broken."""
    assert [folder.name for folder in whole_checkpoints(run.run)][-1] == find_checkpoint(run.run).name
    assert read_meta(find_checkpoint(run.run)).step == step
    assert verify(find_checkpoint(run.run)) == []
    assert finish(run.start(hosts)) == [0, 0], run.told()
    assert ("resume", step) in [(event["kind"], event["step"]) for event in events.read(run.run)]
    assert run.curves() == unbroken.curves()


@pytest.mark.slow
def test_a_link_cut_in_a_step(hosts: Hosts, sources: tuple[Path, Path], unbroken: Run, tmp_path: Path) -> None:
    """Both hosts live on, each for itself, and their watchdogs wake."""
    run = Run(tmp_path, sources, runtime=WATCHDOG)
    ranks = run.start(hosts, "step 3")
    try:
        run.reaches_pause()
        run.has_saved(2)
        hosts.cut("b")
        run.go_on()
        assert finish(ranks, 60) == [1, 1], run.told()
    finally:
        end_ranks(ranks)
        hosts.mend("b")
    assert f"rank 0: {B_IS_GONE}\n" in run.told()
    assert f"rank 1: {A_IS_GONE}\n" in run.told()
    assert events.read(run.run)[-1]["lost"] == B_IS_GONE
    resumes(run, hosts, 2, unbroken)


@pytest.mark.slow
def test_a_link_cut_in_a_save(hosts: Hosts, sources: tuple[Path, Path], unbroken: Run, tmp_path: Path) -> None:
    """By a switch that passes nothing on any more, which no host can see; no watchdog: the collectives give up."""
    run = Run(tmp_path, sources, runtime={"timeout_minutes": 0.2, "watchdog_minutes": 0.0})
    ranks = run.start(hosts, "save 4")
    try:
        run.reaches_pause()
        run.has_saved(2)
        hosts.cut("b", silently=True)
        run.go_on()
        # Megatron-Core counts its groups' time-outs in whole minutes.
        assert finish(ranks, 90) == [1, 1], run.told()
    finally:
        end_ranks(ranks)
        hosts.mend("b")
    assert f"error: {B_IS_GONE}; this run ends here; run the same command to resume" in run.told()
    assert f"error: [rank 1] {A_IS_GONE}; this run ends here; run the same command to resume" in run.told()
    resumes(run, hosts, 2, unbroken)


@pytest.mark.slow
def test_a_process_that_is_killed(hosts: Hosts, sources: tuple[Path, Path], unbroken: Run, tmp_path: Path) -> None:
    """Its host says so at once, and the other rank waits for no time-out."""
    run = Run(tmp_path, sources)
    ranks = run.start(hosts, "step 3")
    try:
        run.reaches_pause()
        run.has_saved(2)
        ranks[1].kill()
        assert finish(ranks, 60) == [1, -9], run.told()
    finally:
        end_ranks(ranks)
    assert "error: ended before this rank: rank 1 on host b: see their logs; this run ends here" in run.told()
    resumes(run, hosts, 2, unbroken)


@pytest.mark.slow
def test_a_host_that_starts_anew(hosts: Hosts, sources: tuple[Path, Path], unbroken: Run, tmp_path: Path) -> None:
    """It takes no leave of the connections it had: the other waits for what will never come."""
    run = Run(tmp_path, sources, runtime=WATCHDOG)
    ranks = run.start(hosts, "step 3")
    try:
        run.reaches_pause()
        run.has_saved(2)
        hosts.reboot("b")
        assert finish(ranks, 60) == [1, -9], run.told()
    finally:
        end_ranks(ranks)
    assert "rank 0: ended before this rank: rank 1 on host b: " in run.told()
    resumes(run, hosts, 2, unbroken)
