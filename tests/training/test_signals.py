"""A signal to one rank makes all of them finish or drop the same step, save once and leave; the run then goes on."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from megalong.checkpoint.folder import whole_checkpoints
from megalong.config.schema import Config
from megalong.training import events
from megalong.training.interrupt import grace_of
from tests.llama import make_dataset, make_llama, single_sample_settings
from tests.pool import WorkerPool
from tests.training.faults import Fault

RUN = "tests.training.faults:faulty_run"


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("signals")
    return make_llama(folder / "llama"), make_dataset(folder / "data")


@pytest.fixture(scope="module")
def unbroken(sources: tuple[Path, Path], pool: WorkerPool, tmp_path_factory: pytest.TempPathFactory) -> list[Any]:
    run = tmp_path_factory.mktemp("unbroken")
    return pool.run(2, RUN, single_sample_settings(run, *sources, training={"train_iters": 5}), [])


# Sample 8 is of step 3; each rank of two runs two micro-batches. Grace 0 has no time for the rest of a step.
@pytest.mark.parametrize(
    ("grace", "faults", "step"),
    [
        pytest.param(1000.0, [Fault("signal", 8)], 3, id="finished"),
        pytest.param(1000.0, [Fault("signal", 8), Fault("signal", 8, 0, micro_batch=2)], 3, id="two-signals"),
        pytest.param(0.0, [Fault("signal", 8)], 2, id="dropped-before"),
        pytest.param(0.0, [Fault("signal", 8, micro_batch=1)], 2, id="dropped-within"),
        pytest.param(1000.0, [Fault("saving", 0), Fault("signal", 8)], 3, id="second-while-saving"),
    ],
)
def test_ranks_agree_on_the_step_save_it_once_and_go_on(
    grace: float,
    faults: list[Fault],
    step: int,
    unbroken: list[Any],
    sources: tuple[Path, Path],
    pool: WorkerPool,
    tmp_path: Path,
) -> None:
    run = tmp_path / "run"
    settings = single_sample_settings(
        run,
        *sources,
        training={"train_iters": 5},
        checkpoint={"save_interval": 2},
        runtime={"signal_grace_seconds": grace},
    )
    for rank in pool.run(2, RUN, settings, faults):
        assert rank["outcome"] == "interrupted"
        assert max(rank["digests"]) == step
    marker = json.loads((run / "REQUEUE").read_text())
    assert marker["step"] == step
    assert [int(path.name[5:]) for path in whole_checkpoints(run)] == sorted({2, step})
    kinds = [(event["kind"], event["step"]) for event in events.read(run)]
    saves = [("save", 2), ("save", 3)][: step - 1]
    assert kinds == [("start", 0), *saves, ("signal", step)]
    resumed = pool.run(2, RUN, settings, [])
    for rank, other in zip(resumed, unbroken, strict=True):
        assert rank["digests"] == {number: other["digests"][number] for number in range(step + 1, 6)}


def test_slurms_warning_leaves_a_step_half_its_lead(
    sources: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = Config.model_validate(single_sample_settings(tmp_path / "run", *sources, slurm={"lead_minutes": 10}))
    monkeypatch.delenv("SLURM_JOB_ID", raising=False)
    assert grace_of(config) == {"SIGTERM": 20, "SIGINT": 20, "SIGUSR1": 20}
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    assert grace_of(config) == {"SIGTERM": 20, "SIGINT": 20, "SIGUSR1": 300}


def test_a_signal_cuts_an_evaluation_short(sources: tuple[Path, Path], pool: WorkerPool, tmp_path: Path) -> None:
    run = tmp_path / "run"
    settings = single_sample_settings(run, *sources, evaluation={"interval": 2, "iters": 8})
    ranks = pool.run(2, RUN, settings, [Fault("evaluating", 0)])
    assert [(rank["outcome"], max(rank["digests"])) for rank in ranks] == [("interrupted", 2)] * 2
    assert [path.name for path in whole_checkpoints(run)] == ["step-00000002"]


def test_a_signal_in_the_last_step_ends_a_finished_run(
    sources: tuple[Path, Path], pool: WorkerPool, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    settings = single_sample_settings(run, *sources, training={"train_iters": 3})
    assert [rank["outcome"] for rank in pool.run(2, RUN, settings, [Fault("signal", 8)])] == ["finished"] * 2
    assert not (run / "REQUEUE").exists()
