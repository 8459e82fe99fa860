"""Saves while training goes on: what is written is the step it was saved at, and no failure costs what was good."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from megalong.checkpoint.folder import remove_old, step_folder, whole_checkpoints
from megalong.config.sections import Checkpoint
from tests.llama import make_dataset, make_llama, run_settings
from tests.pool import RankError, WorkerPool

RUN = "tests.training.saving:run"


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("saving")
    return make_llama(folder / "llama"), make_dataset(folder / "data")


def settings(folder: Path, sources: tuple[Path, Path], **checkpoint: Any) -> dict[str, Any]:
    return run_settings(folder, *sources, checkpoint={"save_interval": 2, "keep_last": 5} | checkpoint)


@pytest.mark.parametrize("optimizer", ["fully_reshardable", pytest.param("dp_reshardable", marks=pytest.mark.slow)])
def test_a_save_beside_training_writes_what_a_blocking_one_does(
    optimizer: str, sources: tuple[Path, Path], pool: WorkerPool, tmp_path: Path
) -> None:
    """Writers are held back until training has gone on for two steps, and weights changed under them."""
    beside = settings(tmp_path / "beside", sources, optimizer=optimizer)
    blocking = settings(tmp_path / "blocking", sources, optimizer=optimizer, async_save=False)
    late = pool.run(2, RUN, beside, {"hold": 2})[0]
    now = pool.run(2, RUN, blocking)[0]
    # The thread that writes begins on GPU 0: it takes the model's device before it does anything.
    saves = [("uses", "cpu"), ("writes", "2"), ("uses", "cpu"), ("writes", "4")]
    assert late["events"][:4] == [("saver", *event) for event in saves]
    assert now["events"][:2] == [("MainThread", "writes", "2"), ("MainThread", "writes", "4")]
    assert late["steps_while_writing"] >= 1
    for step in (2, 4, 10):
        ours, theirs = (step_folder(tmp_path / name, step) for name in ("beside", "blocking"))
        names = {path.name for path in theirs.iterdir()}
        assert {path.name for path in ours.iterdir()} == names
        tensors = [name for name in names if name.endswith(".distcp")]
        assert len(tensors) == 2
        for name in tensors:
            assert (ours / name).read_bytes() == (theirs / name).read_bytes(), (step, name)


@pytest.mark.parametrize(
    ("fault", "reason"),
    [
        pytest.param({"full": 4, "rank": 1}, "No space left", id="full"),
        pytest.param({"readonly": 4}, "Read-only file system", id="read-only"),
    ],
)
def test_a_disk_that_takes_nothing_is_told_and_training_goes_on(
    fault: dict[str, int], reason: str, sources: tuple[Path, Path], pool: WorkerPool, tmp_path: Path
) -> None:
    """At step 4, on one rank: the run is told, steps 2 and 6 are there, and so is all the rest."""
    run = settings(tmp_path / "run", sources, on_save_failure="continue")
    pool.run(2, RUN, run, fault)
    assert [int(path.name[5:]) for path in whole_checkpoints(tmp_path / "run")] == [2, 6, 8, 10]
    assert not list((tmp_path / "run" / "checkpoints").glob("*.tmp"))
    told = [json.loads(line) for line in (tmp_path / "run" / "events.jsonl").read_text().splitlines()]
    failed = [one for one in told if one["kind"] == "save_failed"]
    assert [one["step"] for one in failed] == [4]
    assert reason in failed[0]["reason"]


@pytest.mark.parametrize("async_save", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_a_full_disk_ends_the_run_where_it_shall(
    async_save: bool, sources: tuple[Path, Path], pool: WorkerPool, tmp_path: Path
) -> None:
    run = settings(tmp_path / "run", sources, async_save=async_save)
    with pytest.raises(RankError, match=r"could not be written .No space left on device.; earlier checkpoints"):
        pool.run(2, RUN, run, {"full": 4, "rank": 0})
    assert [path.name for path in whole_checkpoints(tmp_path / "run")] == ["step-00000002"]
    assert not list((tmp_path / "run" / "checkpoints").glob("*.tmp"))


def test_a_folder_that_vanishes_is_made_again(sources: tuple[Path, Path], pool: WorkerPool, tmp_path: Path) -> None:
    pool.run(1, RUN, settings(tmp_path / "run", sources), {"vanish": 4})
    assert [int(path.name[5:]) for path in whole_checkpoints(tmp_path / "run")] == [4, 6, 8, 10]


def test_a_run_whose_last_save_fails_is_not_called_finished(
    sources: tuple[Path, Path], pool: WorkerPool, tmp_path: Path
) -> None:
    """From step 4 on a file is in the folder's place: training goes on to its end, which then is an error."""
    run = settings(tmp_path / "run", sources, on_save_failure="continue")
    with pytest.raises(RankError, match=r"step-00000010 could not be written .*; earlier checkpoints"):
        pool.run(1, RUN, run, {"block": 4})
    told = [json.loads(line) for line in (tmp_path / "run" / "events.jsonl").read_text().splitlines()]
    assert [one["step"] for one in told if one["kind"] == "save_failed"] == [4, 6, 8, 10]


@pytest.mark.parametrize("damage", [pytest.param("content", marks=pytest.mark.slow), "missing"])
def test_a_damaged_checkpoint_is_passed_over_for_the_one_before(
    damage: str, sources: tuple[Path, Path], pool: WorkerPool, tmp_path: Path
) -> None:
    run = settings(tmp_path / "run", sources)
    unbroken = pool.run(2, RUN, settings(tmp_path / "unbroken", sources))[0]["losses"]
    pool.run(2, RUN, run, {"stop": 6})
    newest = step_folder(tmp_path / "run", 6)
    victim = newest / "__1_0.distcp"
    content = victim.read_bytes()
    if damage == "content":
        victim.write_bytes(content[:-9] + bytes([content[-9] ^ 1]) + content[-8:])
    else:
        (newest / "megalong.json").unlink()
    resumed = pool.run(2, RUN, run)[0]
    assert resumed["started"] == 4
    assert resumed["losses"] == unbroken[4:]
    assert newest.with_name("step-00000006.damaged").is_dir()
    assert newest.is_dir()


def test_without_a_good_one_nothing_is_loaded_in_silence(
    sources: tuple[Path, Path], pool: WorkerPool, tmp_path: Path
) -> None:
    run = settings(tmp_path / "run", sources)
    pool.run(1, RUN, run, {"stop": 2})
    victim = step_folder(tmp_path / "run", 2) / "__0_0.distcp"
    content = victim.read_bytes()
    victim.write_bytes(content[:-9] + bytes([content[-9] ^ 1]) + content[-8:])
    with pytest.raises(RankError, match="no checkpoint of this run is good"):
        pool.run(1, RUN, run)


def test_the_newest_and_every_kth_are_kept(tmp_path: Path) -> None:
    for step in range(10, 101, 10):
        step_folder(tmp_path, step).mkdir(parents=True)
    step_folder(tmp_path, 55).with_name("step-00000055.tmp").mkdir()
    remove_old(tmp_path, keep_last=2, keep_every=40)
    assert [int(path.name[5:]) for path in whole_checkpoints(tmp_path)] == [40, 80, 90, 100]
    assert not list(tmp_path.rglob("*.tmp"))
    assert Checkpoint(keep_every=40).keep_every == 40
