"""The layout never changes the maths: ten steps give one process's losses and gradient norms."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.llama import make_dataset, make_llama, run_settings, single_sample_settings
from tests.pool import WorkerPool

STEPS = 10
LAYOUTS = {
    "TP2": (2, {"tensor_model_parallel_size": 2}),
    "TP2+SP": (2, {"tensor_model_parallel_size": 2, "sequence_parallel": True}),
    "PP2": (2, {"pipeline_model_parallel_size": 2}),
    "PP2 interleaved": (2, {"pipeline_model_parallel_size": 2, "virtual_pipeline_model_parallel_size": 2}),
    "CP2": (2, {"context_parallel_size": 2}),
    "CP4": (4, {"context_parallel_size": 4}),
    "DP2": (2, {}),
    "DP2 overlapped": (2, {"overlap_grad_reduce": True, "overlap_param_gather": True}),
    "TP2xCP2": (4, {"tensor_model_parallel_size": 2, "context_parallel_size": 2}),
    "TP2xPP2": (4, {"tensor_model_parallel_size": 2, "pipeline_model_parallel_size": 2}),
}

# The quick tests take the layouts in which several things change; each by itself is slow.
SLOW = ("TP2", "TP2+SP", "PP2", "CP2", "CP4", "DP2", "DP2 overlapped", "TP2xPP2")

# Tied weights are a matter of who holds them: one stage, or two, and all of them or a part. `test_matrix` ties them
# under the other layouts.
TIED = ("TP2+SP", "PP2 interleaved", "DP2 overlapped", "TP2xPP2")


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("parity")
    return {
        "folder": folder,
        "untied": make_llama(folder / "untied"),
        "tied": make_llama(folder / "tied", tie_word_embeddings=True),
        "data": make_dataset(folder / "data"),
    }


def settings_of(sources: dict[str, Path], name: str, model: str, **sections: dict[str, Any]) -> dict[str, Any]:
    return single_sample_settings(sources["folder"] / name, sources[model], sources["data"], **sections)


@pytest.fixture(scope="module")
def references(sources: dict[str, Path], pool: WorkerPool) -> dict[str, dict[str, list[float]]]:
    """One process's ten steps, per model."""
    return {
        model: pool.run(1, "tests.training.workers:train_steps", settings_of(sources, "one", model), STEPS)[0]
        for model in ("untied", "tied")
    }


@pytest.mark.parametrize(
    ("model", "layout"),
    [
        *(pytest.param("untied", one, marks=[pytest.mark.slow] if one in SLOW else []) for one in LAYOUTS),
        *(("tied", layout) for layout in TIED),
    ],
)
def test_layout_gives_the_losses_and_norms_of_one_process(
    model: str, layout: str, sources: dict[str, Path], references: Any, pool: WorkerPool
) -> None:
    world, parallel = LAYOUTS[layout]
    settings = settings_of(sources, layout, model, parallel=parallel)
    ranks = pool.run(world, "tests.training.workers:train_steps", settings, STEPS)
    for result in ranks:
        assert result["loss"] == pytest.approx(references[model]["loss"], rel=1e-5)
        assert result["norm"] == pytest.approx(references[model]["norm"], rel=1e-5)


@pytest.mark.parametrize("recompute", ["full", pytest.param("selective", marks=pytest.mark.slow)])
def test_recompute_changes_nothing(recompute: str, sources: dict[str, Path], references: Any, pool: WorkerPool) -> None:
    settings = settings_of(
        sources, recompute, "untied", memory={"recompute": recompute}, parallel={"context_parallel_size": 2}
    )
    for result in pool.run(2, "tests.training.workers:train_steps", settings, STEPS):
        assert result["loss"] == pytest.approx(references["untied"]["loss"], rel=1e-5)


def test_the_run_learns(sources: dict[str, Path], pool: WorkerPool, tmp_path: Path) -> None:
    """Equal numbers prove nothing if nothing moves: a few documents seen again and again are soon known."""
    few = make_dataset(tmp_path / "few", documents=4)
    settings = run_settings(tmp_path / "run", sources["untied"], few, optimizer={"lr": 5e-3})
    settings["data"]["split"] = "100,0"
    losses = pool.run(1, "tests.training.workers:train_steps", settings, STEPS)[0]["loss"]
    assert losses[-1] < losses[0] - 0.5
