"""A run that stops and goes on is the run that never stopped."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest

from megalong.checkpoint.folder import find_checkpoint, read_meta, whole_checkpoints, write_meta
from tests.hf.conftest import save_tokenizer
from tests.llama import make_dataset, make_llama, run_settings
from tests.pool import RankError, WorkerPool

TRAIN = "tests.training.workers:train_run"


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("resume")
    return make_llama(folder / "llama"), make_dataset(folder / "data")


def losses(result: dict[str, Any]) -> dict[int, tuple[float, float]]:
    return {record["step"]: (record["loss"], record["gradient_norm"]) for record in result["records"]}


@pytest.mark.parametrize(
    ("world", "parallel"),
    [
        pytest.param(1, {}, marks=pytest.mark.slow),
        pytest.param(2, {"tensor_model_parallel_size": 2}, marks=pytest.mark.slow),
        (2, {}),
    ],
)
def test_resume_is_bit_for_bit(
    world: int, parallel: dict[str, Any], sources: tuple[Path, Path], pool: WorkerPool, tmp_path: Path
) -> None:
    def settings(name: str) -> dict[str, Any]:
        return run_settings(tmp_path / name, *sources, parallel=parallel, checkpoint={"save_interval": 5})

    unbroken = losses(pool.run(world, TRAIN, settings("unbroken"))[0])
    broken = pool.run(world, TRAIN, settings("broken"), 7)[0]
    resumed = pool.run(world, TRAIN, settings("broken"))[0]
    assert (broken["started"], resumed["started"]) == (0, 5)
    assert losses(resumed) == {step: unbroken[step] for step in range(6, 11)}


@pytest.mark.slow
def test_bf16_resume_is_bit_for_bit(sources: tuple[Path, Path], pool: WorkerPool, tmp_path: Path) -> None:
    def settings(name: str) -> dict[str, Any]:
        return run_settings(
            tmp_path / name,
            *sources,
            parallel={"context_parallel_size": 2},
            precision={"params_dtype": "bf16"},
            checkpoint={"save_interval": 5},
        )

    unbroken = losses(pool.run(2, TRAIN, settings("unbroken"))[0])
    pool.run(2, TRAIN, settings("broken"), 5)
    assert losses(pool.run(2, TRAIN, settings("broken"))[0]) == {step: unbroken[step] for step in range(6, 11)}


@pytest.mark.slow
def test_another_layout_goes_on(sources: tuple[Path, Path], pool: WorkerPool, tmp_path: Path) -> None:
    """The optimizer's state is stored for any layout, and the position in the data does not depend on it."""
    unbroken = losses(pool.run(1, TRAIN, run_settings(tmp_path / "one", *sources, checkpoint={"save_interval": 5}))[0])
    pool.run(1, TRAIN, run_settings(tmp_path / "run", *sources, checkpoint={"save_interval": 5}), 5)
    parallel = {"tensor_model_parallel_size": 2, "pipeline_model_parallel_size": 2}
    resumed = losses(pool.run(4, TRAIN, run_settings(tmp_path / "run", *sources, parallel=parallel))[0])
    assert sorted(resumed) == list(range(6, 11))
    for step, (loss, norm) in resumed.items():
        assert loss == pytest.approx(unbroken[step][0], rel=1e-5)
        assert norm == pytest.approx(unbroken[step][1], rel=1e-5)


def test_old_checkpoints_go_and_unfinished_ones_are_not_seen(
    sources: tuple[Path, Path], pool: WorkerPool, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    left = run / "checkpoints" / "step-00000099.tmp"
    left.mkdir(parents=True)
    pool.run(1, TRAIN, run_settings(run, *sources, checkpoint={"save_interval": 2, "keep_last": 2}), 9)
    assert [path.name for path in whole_checkpoints(run)] == ["step-00000006", "step-00000008"]
    assert not left.exists()
    meta = read_meta(find_checkpoint(run))
    assert (meta.step, meta.consumed_samples) == (8, 32)


def test_the_tokenizer_outlives_the_checkpoint_that_a_run_resumed_from(
    sources: tuple[Path, Path], pool: WorkerPool, tmp_path: Path
) -> None:
    """And the model that it started from; a run whose checkpoints have lost it gets it back."""
    model = shutil.copytree(sources[0], tmp_path / "hf")
    save_tokenizer(model)
    run = tmp_path / "run"
    settings = run_settings(run, model, sources[1], checkpoint={"save_interval": 1, "keep_last": 1})
    pool.run(1, TRAIN, settings, 2)
    away = model.rename(tmp_path / "away")
    pool.run(1, TRAIN, settings, 6)
    kept = _saved_tokenizer(run)
    assert kept.parent.name == "step-00000006"
    assert (kept / "tokenizer.json").read_bytes() == (run / "tokenizer" / "tokenizer.json").read_bytes()

    _lose_tokenizer(run)  # as an earlier version left it
    pool.run(1, TRAIN, settings, 8)
    assert (_saved_tokenizer(run) / "tokenizer.json").is_file()

    _lose_tokenizer(run)
    shutil.rmtree(run / "tokenizer")
    away.rename(model)
    pool.run(1, TRAIN, settings, 9)
    assert (_saved_tokenizer(run) / "tokenizer.json").is_file()


def _saved_tokenizer(run: Path) -> Path:
    return find_checkpoint(run) / "tokenizer"


def _lose_tokenizer(run: Path) -> None:
    checkpoint = find_checkpoint(run)
    shutil.rmtree(checkpoint / "tokenizer")
    meta = read_meta(checkpoint)
    files = {name: value for name, value in meta.checksums.items() if not name.startswith("tokenizer/")}
    write_meta(checkpoint, meta.model_copy(update={"checksums": files}))


@pytest.mark.slow
def test_held_out_loss_is_the_same_under_any_layout(
    sources: tuple[Path, Path], pool: WorkerPool, tmp_path: Path
) -> None:
    def evaluated(name: str, world: int, parallel: dict[str, Any]) -> dict[str, Any]:
        settings = run_settings(tmp_path / name, *sources, parallel=parallel, evaluation={"interval": 2, "iters": 2})
        return pool.run(world, TRAIN, settings, 2)[0]["records"][-1]

    one = evaluated("one", 1, {})
    assert one["validation_loss"] > 0
    for name, world, parallel in (
        ("pp", 2, {"pipeline_model_parallel_size": 2}),
        ("tpcp", 4, {"tensor_model_parallel_size": 2, "context_parallel_size": 2}),
    ):
        other = evaluated(name, world, parallel)
        assert other["validation_loss"] == pytest.approx(one["validation_loss"], rel=1e-5)
        for key in ("position_losses", "validation_position_losses"):
            assert other[key] == pytest.approx(one[key], rel=1e-5)


@pytest.mark.slow
def test_dp_reshardable_allows_data_and_context_parallelism_to_change(
    sources: tuple[Path, Path], pool: WorkerPool, tmp_path: Path
) -> None:
    def settings(name: str, parallel: dict[str, Any]) -> dict[str, Any]:
        return run_settings(
            tmp_path / name,
            *sources,
            parallel=parallel,
            checkpoint={"save_interval": 5, "optimizer": "dp_reshardable"},
        )

    unbroken = losses(pool.run(2, TRAIN, settings("unbroken", {}))[0])
    pool.run(2, TRAIN, settings("run", {}), 5)
    with pytest.raises(RankError, match=r"dp_reshardable under TP 1 × PP 1 .* this run has TP 2"):
        pool.run(2, TRAIN, settings("run", {"tensor_model_parallel_size": 2}))
    resumed = losses(pool.run(4, TRAIN, settings("run", {"context_parallel_size": 2}))[0])
    for step in range(6, 11):
        assert resumed[step] == pytest.approx(unbroken[step], rel=1e-5)
