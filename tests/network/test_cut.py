"""A host that is gone in the middle of a step, or of a save: the run ends by itself, says which, and resumes."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from megalong.checkpoint.folder import find_checkpoint, read_meta, verify
from megalong.training import events
from tests.network.hosts import Hosts
from tests.network.runs import STEPS, Run
from tests.ranks import end_ranks, finish


@pytest.fixture(scope="module")
def unbroken(hosts: Hosts, sources: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A run of the same steps that nothing happens to, on one host."""
    from tests.ranks import start_ranks

    run = Run(tmp_path_factory.mktemp("unbroken"), sources)
    assert finish(start_ranks(["train", str(run.config)], 2, run.log)) == [0, 0], run.told()
    assert len(run.curves()["loss/train"]) == STEPS
    return run


def test_a_cut_link(hosts: Hosts, sources: tuple[Path, Path], unbroken: Run, tmp_path: Path) -> None:
    run = Run(tmp_path, sources, runtime={"timeout_minutes": 1.0, "watchdog_minutes": 0.1})
    ranks = run.start(hosts, "step 3")
    t = time.time()
    try:
        run.reaches_pause()
        run.has_saved(2)
        print(time.time() - t)
        hosts.cut("b")
        run.go_on()
        print(finish(ranks, 90), time.time() - t)
    finally:
        end_ranks(ranks)
        hosts.mend("b")
    print(run.told())
    print(events.read(run.run))
    assert read_meta(find_checkpoint(run.run)).step == 2
    assert finish(run.start(hosts)) == [0, 0]
    assert run.curves() == unbroken.curves()
