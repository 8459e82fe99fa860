"""Each weight's gradient, on every rank that holds it, against one process and against plain transformers.

The norm of all gradients can hide a wrong one: a norm weight's is a thousandth of it. The largest difference within a
tensor is measured against the tensor's own largest gradient.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.llama import make_dataset, make_llama, run_settings
from tests.pool import WorkerPool
from tests.training.gradients import Slice, global_batches, plain_gradients

GRADIENTS = "tests.training.gradients:rank_gradients"
TOLERANCE = 1e-5
LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "one process": (1, {}),
    "TP2+SP": (2, {"tensor_model_parallel_size": 2, "sequence_parallel": True}),
    "PP2 interleaved": (2, {"pipeline_model_parallel_size": 2, "virtual_pipeline_model_parallel_size": 2}),
    "CP2": (2, {"context_parallel_size": 2}),
    "DP2": (2, {}),
    "TP2xCP2": (4, {"tensor_model_parallel_size": 2, "context_parallel_size": 2}),
}
Gradients = dict[str, np.ndarray]


def of_layout(layout: str, llama: Path, data: Path, pool: WorkerPool) -> list[list[Slice]]:
    """Every rank's gradients; those of the padded vocabulary rows are zero, or the test ends here."""
    world, parallel = LAYOUTS[layout]
    # The sharded optimizer leaves each rank the reduced gradient of its own shard only.
    parallel = {**parallel, "use_distributed_optimizer": False}
    ranks = pool.run(world, GRADIENTS, run_settings(llama.parent / "run", llama, data, parallel=parallel))
    assert [padding for _, padding in ranks] == [0.0] * world
    return [slices for slices, _ in ranks]


def whole(slices: Iterable[Slice], like: Gradients) -> Gradients:
    """The tensors that `slices` make up; what none of them covers is not a number."""
    tensors = {name: np.full_like(values, np.nan) for name, values in like.items()}
    for part in slices:
        _part_of(tensors[part.tensor], part)[...] = part.values
    return tensors


def differences(slices: Iterable[Slice], reference: Gradients) -> dict[str, float]:
    """Per tensor: the largest difference of any slice, relative to the largest value of the whole tensor."""
    found = dict.fromkeys(reference, 0.0)
    for part in slices:
        difference = np.abs(part.values - _part_of(reference[part.tensor], part)).max()
        relative = difference / np.abs(reference[part.tensor]).max()
        found[part.tensor] = float(np.maximum(found[part.tensor], relative))  # unlike max() keeps what is not a number
    return found


def _part_of(tensor: np.ndarray, part: Slice) -> np.ndarray:
    cut = slice(part.start, part.start + part.values.shape[part.dim])
    return tensor[cut] if part.dim == 0 else tensor[:, cut]


@pytest.fixture(scope="module", params=["untied", "tied"])
def sources(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp(f"gradients-{request.param}")
    llama = make_llama(folder / "llama", tie_word_embeddings=request.param == "tied")
    return llama, make_dataset(folder / "data")


@pytest.fixture(scope="module")
def plain(sources: tuple[Path, Path]) -> Gradients:
    """By transformers and torch's autograd."""
    llama, data = sources
    return plain_gradients(llama, next(global_batches(run_settings(llama.parent / "run", llama, data))))


@pytest.fixture(scope="module")
def one_process(sources: tuple[Path, Path], plain: Gradients, pool: WorkerPool) -> Gradients:
    (slices,) = of_layout("one process", *sources, pool)
    return whole(slices, plain)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_gradient_on_every_rank(
    layout: str, sources: tuple[Path, Path], plain: Gradients, one_process: Gradients, pool: WorkerPool
) -> None:
    ranks = of_layout(layout, *sources, pool)
    everything = [part for slices in ranks for part in slices]
    missing = [name for name, values in whole(everything, plain).items() if np.isnan(values).any()]
    assert missing == []
    for reference in (plain, one_process):
        found = differences(everything, reference)
        assert {name: value for name, value in found.items() if not value <= TOLERANCE} == {}


def test_no_gradient_vanishes(plain: Gradients) -> None:
    """A tensor whose gradients are rounding noise would compare nothing."""
    assert all(np.abs(values).max() > 1e-4 for values in plain.values())
