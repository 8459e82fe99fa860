"""A run saved under one layout goes on under another as if nothing had happened, optimizer state included.

Twelve pairs: five steps and a checkpoint under the first layout, five more under the second; what those log is what one
process logs that never stopped. Between them the pairs change each dimension alone and all four at once, with an
interleaved pipeline on either side.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.llama import make_dataset, make_llama, single_sample_settings
from tests.pool import WorkerPool
from tests.training.comparison import TOLERANCE, deviation

TRAIN = "tests.training.workers:train_run"
SAVED, STEPS = 5, 10
MODELS = ("untied", "tied")


def sizes(tensor: int = 1, context: int = 1, pipeline: int = 1, virtual: int = 1, **others: Any) -> dict[str, Any]:
    return {
        "tensor_model_parallel_size": tensor,
        "context_parallel_size": context,
        "pipeline_model_parallel_size": pipeline,
        "virtual_pipeline_model_parallel_size": virtual,
        **others,
    }


LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "one": (1, sizes()),
    "DP2": (2, sizes()),
    "DP2 overlapped": (2, sizes(overlap_grad_reduce=True, overlap_param_gather=True)),
    "DP4": (4, sizes()),
    "CP4": (4, sizes(context=4)),
    "TP4+SP": (4, sizes(tensor=4, sequence_parallel=True)),
    "PP4": (4, sizes(pipeline=4)),
    "PP2 interleaved": (2, sizes(pipeline=2, virtual=2)),
    "DP2xPP2 interleaved": (4, sizes(pipeline=2, virtual=2)),
    "DP2xCP2": (4, sizes(context=2)),
    "DP2xTP2": (4, sizes(tensor=2)),
    "TP2xCP2": (4, sizes(tensor=2, context=2)),
    "TP2xPP2": (4, sizes(tensor=2, pipeline=2)),
    "TP2xPP2 interleaved": (4, sizes(tensor=2, pipeline=2, virtual=2)),
    "PP2xCP2": (4, sizes(pipeline=2, context=2)),
}
QUICK = [
    ("TP2xPP2 interleaved", "DP2xCP2", "untied"),  # DP, CP, TP and PP all change
]
SLOW = [
    ("DP2", "PP2 interleaved", "tied"),
    ("PP4", "TP2xCP2", "untied"),
    ("DP2xCP2", "TP2xPP2 interleaved", "tied"),  # and the other way round
    ("PP2 interleaved", "DP2 overlapped", "tied"),
    ("one", "CP4", "untied"),
    ("CP4", "one", "untied"),
    ("DP4", "TP4+SP", "untied"),
    ("TP4+SP", "DP2xPP2 interleaved", "tied"),
    ("PP2xCP2", "DP2xTP2", "tied"),
    ("DP2 overlapped", "PP4", "tied"),
    ("TP2xPP2", "TP2xPP2 interleaved", "untied"),
]

Runs = dict[str, list[float]]


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, Path]]:
    folder = tmp_path_factory.mktemp("layouts")
    data = make_dataset(folder / "data")
    return {model: (make_llama(folder / model, tie_word_embeddings=model == "tied"), data) for model in MODELS}


@pytest.fixture(scope="module")
def unbroken(
    sources: dict[str, tuple[Path, Path]], tmp_path_factory: pytest.TempPathFactory, pool: WorkerPool
) -> dict[str, Runs]:
    """What one process that never stops logs of the steps after the checkpoint."""
    folder = tmp_path_factory.mktemp("unbroken")
    return {
        model: after_saving(pool.run(1, TRAIN, single_sample_settings(folder / model, *sources[model]))[0])
        for model in MODELS
    }


def after_saving(result: dict[str, Any]) -> Runs:
    records = [record for record in result["records"] if record["step"] > SAVED]
    assert [record["step"] for record in records] == list(range(SAVED + 1, STEPS + 1))
    return {"loss": [r["loss"] for r in records], "norm": [r["gradient_norm"] for r in records]}


@pytest.mark.parametrize(
    ("before", "after", "model"), [*QUICK, *(pytest.param(*pair, marks=pytest.mark.slow) for pair in SLOW)]
)
def test_a_run_goes_on_under_another_layout(
    before: str,
    after: str,
    model: str,
    sources: dict[str, tuple[Path, Path]],
    unbroken: dict[str, Runs],
    pool: WorkerPool,
    tmp_path: Path,
) -> None:
    def run(layout: str, stop_after: int | None) -> list[dict[str, Any]]:
        world, parallel = LAYOUTS[layout]
        settings = single_sample_settings(
            tmp_path / "run",
            *sources[model],
            parallel=parallel,
            checkpoint={"save_interval": SAVED},
        )
        return pool.run(world, TRAIN, settings, stop_after)

    run(before, SAVED)
    ranks = run(after, None)
    assert [rank["started"] for rank in ranks] == [SAVED] * len(ranks)
    found = deviation([after_saving(rank) for rank in ranks], unbroken[model])
    print(f"{before} to {after}: {found:.1e}")
    assert found <= TOLERANCE["fp32"]
