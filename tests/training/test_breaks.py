"""The parity comparison catches what it is for: each piece broken on purpose is far outside its tolerance.

The same layout runs unbroken afterwards, on the same workers: that run agrees with one process, so it is the break that
was seen, and it has been undone.

Two breaks are no larger than bf16's tolerance of 1e-2 (a tied table's gradient not reduced over the pipeline 1e-2, norm
weights not marked under sequence parallelism 2e-3): it is the fp32 half of the matrix that sees them.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.llama import make_dataset, make_llama, run_settings
from tests.pool import WorkerPool
from tests.training.comparison import TOLERANCE, deviation

STEPS = 3
TP2 = {"tensor_model_parallel_size": 2}
PP2 = {"pipeline_model_parallel_size": 2}
CP2 = {"context_parallel_size": 2}
BREAKS: dict[str, tuple[dict[str, Any], list[str]]] = {
    "DP2": ({}, ["dropped_gradient_reduce", "same_samples_on_every_replica"]),
    "PP2": (PP2, ["dropped_embedding_reduce", "layers_counted_from_zero"]),
    "CP2": (
        CP2,
        [
            "swapped_zigzag_chunks",
            "zigzag_of_another_rank",
            "positions_of_the_shard",
            "tokens_of_one_context_rank",
            "undivided_gradient",
        ],
    ),
    "TP2": (TP2, ["unmarked_slices", "slice_of_another_rank"]),
    "TP2+SP": ({**TP2, "sequence_parallel": True}, ["unmarked_norms"]),
}


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("breaks")
    return make_llama(folder / "tied", tie_word_embeddings=True), make_dataset(folder / "data")


@pytest.fixture(scope="module")
def reference(sources: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory, pool: WorkerPool) -> Any:
    settings = run_settings(tmp_path_factory.mktemp("one"), *sources)
    return pool.run(1, "tests.training.workers:train_steps", settings, STEPS)[0]


@pytest.mark.parametrize(
    "layout", ["CP2", *(pytest.param(one, marks=pytest.mark.slow) for one in BREAKS if one != "CP2")]
)
def test_a_broken_piece_is_seen(
    layout: str, sources: tuple[Path, Path], reference: Any, pool: WorkerPool, tmp_path: Path
) -> None:
    parallel, names = BREAKS[layout]
    settings = run_settings(tmp_path / "run", *sources, parallel=parallel)
    ranks = pool.run(2, "tests.training.breaks:train_broken", settings, STEPS, names)
    *broken, whole = (deviation(runs, reference) for runs in zip(*ranks, strict=True))
    found = dict(zip(names, broken, strict=True))
    print({name: f"{value:.1e}" for name, value in found.items()}, f"unbroken {whole:.1e}")
    assert whole <= TOLERANCE["fp32"]
    assert {name: value for name, value in found.items() if value <= 10 * TOLERANCE["fp32"]} == {}
