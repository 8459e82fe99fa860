"""Random damages: each is found when a run starts, on all ranks, and all of the state is the one before's."""

from __future__ import annotations

from pathlib import Path

import pytest

from megalong.checkpoint.folder import whole_checkpoints
from tests.llama import make_dataset, make_llama, run_settings
from tests.pool import WorkerPool


@pytest.mark.parametrize("seeds", [range(5), pytest.param(range(50), marks=pytest.mark.slow)], ids=["5", "50"])
def test_flips_cuts_and_missing_files_are_all_found_at_the_start(
    seeds: range, tmp_path: Path, pool: WorkerPool
) -> None:
    settings = run_settings(
        tmp_path / "run",
        make_llama(tmp_path / "llama", num_hidden_layers=2),
        make_dataset(tmp_path / "data"),
        checkpoint={"save_interval": 2},
        training={"train_iters": 4},
    )
    pool.run(2, "tests.training.workers:train_run", settings)
    before = [path.name for path in whole_checkpoints(tmp_path / "run")]
    assert before == ["step-00000002", "step-00000004"]
    for found in pool.run(2, "tests.checkpoint.damaging:starts", settings, [None, -1, *seeds], timeout=280):
        (_, step, state), *damaged = found
        assert step == 2
        assert [one for one in damaged if one[1:] != (step, state)] == []
        assert len(damaged) == len(seeds) + 1
    assert [path.name for path in whole_checkpoints(tmp_path / "run")] == before
