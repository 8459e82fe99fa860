"""The whole parity matrix: layout × precision × recompute × tied or not, each ten steps against one process.

    12 layouts × fp32 × {none, full, selective} × {tied, untied} = 72 runs against 2 references
    12 layouts × bf16 × {none untied, full tied, selective untied} = 36 runs against 2 references

A reference is one process without recomputation at the same precision: what is computed twice is computed alike, so
recomputation has no reference of its own. A test is one layout at one precision; its runs share the workers, and the
message of a failure names every one of them that is too far off. bf16 takes half of the settings, for time: what is
recomputed or tied is so whatever the precision.

Rounding in bf16 alone moves the gradient norm of the quick tests' batch of 256 tokens by up to 1.2e-2 from layout to
layout, so that 1e-2 could not tell it from a mistake; it averages out over more tokens. Hence 1024 tokens a batch here,
in as many micro-batches as there are stages, for time. The quick tests of `test_parity` train on one sample a
micro-batch, four or two of them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from tests.llama import make_dataset, make_llama, run_settings
from tests.pool import WorkerPool
from tests.training.comparison import TOLERANCE, deviation

pytestmark = pytest.mark.slow

STEPS = 10
TP2 = {"tensor_model_parallel_size": 2}
PP2 = {"pipeline_model_parallel_size": 2}
CP2 = {"context_parallel_size": 2}
INTERLEAVED = {**PP2, "virtual_pipeline_model_parallel_size": 2}
LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "TP2": (2, TP2),
    "TP2+SP": (2, {**TP2, "sequence_parallel": True}),
    "PP2": (2, PP2),
    "PP2 interleaved": (2, INTERLEAVED),
    "PP4": (4, {"pipeline_model_parallel_size": 4}),
    "CP2": (2, CP2),
    "CP4": (4, {"context_parallel_size": 4}),
    "DP2": (2, {}),
    "TP2xCP2": (4, {**TP2, **CP2}),
    "PP2xCP2": (4, {**PP2, **CP2}),
    "TP2xPP2": (4, {**TP2, **PP2}),
    "TP2xPP2 interleaved": (4, {**TP2, **INTERLEAVED}),
}
MODELS = ("untied", "tied")
WHICH = {
    "fp32": [(model, recompute) for model in MODELS for recompute in ("none", "full", "selective")],
    "bf16": [("untied", "none"), ("tied", "full"), ("untied", "selective")],
}

Settings = Callable[..., dict[str, Any]]


@pytest.fixture(scope="module")
def settings(tmp_path_factory: pytest.TempPathFactory) -> Settings:
    folder = tmp_path_factory.mktemp("matrix")
    llamas = {name: make_llama(folder / name, tie_word_embeddings=name == "tied") for name in MODELS}
    data = make_dataset(folder / "data")

    def of(model: str, dtype: str, recompute: str = "none", parallel: dict[str, Any] | None = None) -> dict[str, Any]:
        split = parallel or {}
        parts = split.get("pipeline_model_parallel_size", 1 if split else 2)  # without a split, two replicas or one
        return run_settings(
            folder / "run",
            llamas[model],
            data,
            precision={"params_dtype": dtype},
            memory={"recompute": recompute},
            parallel=split,
            training={"global_batch_size": 16, "micro_batch_size": 16 // parts},
        )

    return of


@pytest.fixture(scope="module")
def references(settings: Settings, pool: WorkerPool) -> dict[tuple[str, str], dict[str, list[float]]]:
    """One process's ten steps, per model and precision."""
    which = [(model, dtype) for model in MODELS for dtype in TOLERANCE]
    many = [settings(model, dtype) for model, dtype in which]
    return dict(zip(which, pool.run(1, "tests.training.workers:train_each", many, STEPS)[0], strict=True))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", TOLERANCE)
def test_every_setting_gives_the_losses_and_norms_of_one_process(
    dtype: str, layout: str, settings: Settings, references: Any, pool: WorkerPool
) -> None:
    world, parallel = LAYOUTS[layout]
    which = WHICH[dtype]
    many = [settings(model, dtype, recompute, parallel) for model, recompute in which]
    ranks = pool.run(world, "tests.training.workers:train_each", many, STEPS, timeout=280)
    found = {
        setting: deviation([rank[index] for rank in ranks], references[setting[0], dtype])
        for index, setting in enumerate(which)
    }
    print({" ".join(setting): f"{value:.1e}" for setting, value in found.items()})
    assert {setting: value for setting, value in found.items() if value > TOLERANCE[dtype]} == {}


@pytest.mark.parametrize("model", MODELS)
def test_bf16_is_not_fp32(model: str, references: Any) -> None:
    """That the precision is really changed; and by how little the numbers differ, which bounds what 1e-2 can tell."""
    exact, rounded = references[model, "fp32"], references[model, "bf16"]
    assert 1e-5 < deviation([rounded], exact) < 0.1
