"""The optimizer's state, saved range by range and loaded under any layout: element by element as if gathered.

The reference is Megatron-Core's own `fully_reshardable`, which gathers whole parameters before it saves them and cuts
them up after it has loaded them.
"""

from __future__ import annotations

import itertools
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed.checkpoint as torch_checkpoint
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from megalong.checkpoint.optimizer_state import boxes
from tests.llama import VOCABULARY, make_dataset, make_llama, single_sample_settings
from tests.pool import WorkerPool
from tests.training.test_resume_layouts import LAYOUTS

RUN = "tests.checkpoint.optimizer_workers:run"
BF16 = {"precision": {"params_dtype": "bf16"}}
LORA = {"lora": {"rank": 3, "target_modules": ["q_proj", "v_proj", "o_proj", "gate_proj", "down_proj"]}}

QUICK = [
    pytest.param("TP2xPP2 interleaved", "DP2xCP2", "untied", {}, id="all change"),
]
SLOW = [
    pytest.param("DP4", "TP2xPP2", "tied", BF16, id="DP to TP and PP, tied, bf16"),
    pytest.param("DP2", "TP2xCP2", "untied", LORA, id="LoRA"),
    pytest.param("DP2xTP2", "PP4", "tied", {}, id="DP and TP to PP, tied"),
    pytest.param("PP2xCP2", "DP2xTP2", "tied", BF16, id="PP and CP to DP and TP, tied, bf16"),
    pytest.param("TP4+SP", "one", "untied", BF16, id="TP to one, bf16"),
    pytest.param("one", "TP4+SP", "tied", {}, id="one to TP, tied"),
    pytest.param("DP2xPP2 interleaved", "DP2 overlapped", "untied", BF16, id="PP to DP, bf16"),
    pytest.param("TP2xPP2", "DP4", "untied", LORA | BF16, id="LoRA, bf16"),
]


@pytest.mark.parametrize("shape", [(), (1,), (7,), (4, 5), (1, 6), (6, 1), (3, 2, 4), (2, 1, 3, 2)])
def test_boxes_of_any_range_hold_its_elements_in_order(shape: tuple[int, ...]) -> None:
    elements = np.arange(math.prod(shape)).reshape(shape)
    for start, stop in itertools.combinations(range(elements.size + 1), 2):
        found = list(boxes(shape, start, stop))
        taken = [elements[tuple(slice(a, a + n) for a, n in zip(*box, strict=True))] for box in found]
        assert [part.shape for part in taken] == [box[1] for box in found]
        assert np.concatenate([part.ravel() for part in taken]).tolist() == list(range(start, stop))
        assert len(found) <= max(1, 2 * len(shape) - 1)
    assert list(boxes(shape, elements.size, elements.size)) == []


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, Path]]:
    folder = tmp_path_factory.mktemp("optimizer-state")
    data = make_dataset(folder / "data")
    models = {model: make_llama(folder / model, tie_word_embeddings=model == "tied") for model in ("untied", "tied")}
    return {model: (llama, data) for model, llama in models.items()}


@pytest.mark.parametrize(
    ("before", "after", "model", "sections"),
    [*QUICK, *(pytest.param(*one.values, id=one.id, marks=pytest.mark.slow) for one in SLOW)],
)
def test_what_is_saved_and_loaded_is_the_gathered_state(
    before: str,
    after: str,
    model: str,
    sections: dict[str, Any],
    sources: dict[str, tuple[Path, Path]],
    pool: WorkerPool,
    tmp_path: Path,
) -> None:
    """Under one layout and then another, each by our code and by Megatron-Core's, in every combination."""

    def run(layout: str, *jobs: tuple[str, Any]) -> None:
        world, parallel = LAYOUTS[layout]
        settings = single_sample_settings(tmp_path / layout, *sources[model], parallel=parallel, **sections)
        pool.run(world, RUN, settings, *jobs)

    def path(name: str) -> str:
        return str(tmp_path / name)

    run(before, ("train", 2), ("save", path("ours")), ("theirs save", path("theirs")))
    saved = tensors(tmp_path / "theirs")
    assert any(key.startswith("optimizer.state.exp_avg_sq.") for key in saved)
    assert_equal(tensors(tmp_path / "ours"), saved)

    run(
        after,
        ("load", path("ours")),
        ("theirs save", path("ours loaded")),
        ("train", 1),  # so that what the next one does not load is seen
        ("load", path("theirs")),
        ("theirs save", path("theirs loaded")),
        ("train", 1),
        ("theirs load", path("ours")),
        ("save", path("ours loaded by theirs")),
    )
    for name in ("ours loaded", "theirs loaded", "ours loaded by theirs"):
        assert_equal(tensors(tmp_path / name), saved)


def test_ranges_of_many_buckets_are_the_right_ones(
    sources: dict[str, tuple[Path, Path]], pool: WorkerPool, tmp_path: Path
) -> None:
    """Each bucket ends in padding. Masters of fp32 weights are the weights; moments are those of a single bucket."""

    def run(name: str, *jobs: tuple[str, Any]) -> dict[str, torch.Tensor]:
        settings = single_sample_settings(tmp_path / name, *sources["untied"], parallel={"overlap_grad_reduce": True})
        pool.run(2, RUN, settings, *jobs, ("save", str(tmp_path / f"{name} saved")))
        return tensors(tmp_path / f"{name} saved")

    many = run("many", ("buckets", 5000), ("train", 2))
    for key, weight in many.items():
        if not key.startswith("optimizer."):
            assert torch.equal(many[f"optimizer.state.param.{key}"], weight), key
    assert_equal(run("one", ("load", str(tmp_path / "many saved"))), many)
    single = run("single", ("train", 2))
    for key, moments in many.items():
        torch.testing.assert_close(moments, single[key], rtol=1e-3, atol=1e-5, msg=key)
    assert_equal(run("again", ("buckets", 3000), ("load", str(tmp_path / "many saved"))), many)


def test_masters_of_a_bf16_run_are_the_weights_of_one_in_fp32(
    sources: dict[str, tuple[Path, Path]], pool: WorkerPool, tmp_path: Path
) -> None:
    """Weights are stored rounded to bf16, masters are not; in fp32 both are one tensor."""

    def run(name: str, sections: dict[str, Any], *jobs: tuple[str, Any]) -> dict[str, torch.Tensor]:
        settings = single_sample_settings(tmp_path / name, *sources["untied"], **sections)
        pool.run(1, RUN, settings, *jobs, ("save", str(tmp_path / f"{name} saved")))
        return tensors(tmp_path / f"{name} saved")

    before = run("bf16", BF16, ("train", 2))
    after = run("fp32", {}, ("load", str(tmp_path / "bf16 saved")))
    masters = {key: one for key, one in before.items() if key.startswith("optimizer.")}
    assert_equal({key: after[key] for key in masters}, masters)
    weights = {key.removeprefix("optimizer.state.param."): one for key, one in masters.items() if ".param." in key}
    assert any(not torch.equal(before[key].float(), one) for key, one in weights.items())
    assert_equal({key: after[key] for key in weights}, weights)


def tensors(checkpoint: Path) -> dict[str, torch.Tensor]:
    """Every tensor of a checkpoint, whole, as torch reads it; rows of the padded vocabulary left out."""
    reader = torch_checkpoint.FileSystemReader(checkpoint)
    described = reader.read_metadata().state_dict_metadata
    found: dict[str, Any] = {
        key: torch.full(one.size, float("nan"), dtype=one.properties.dtype)
        for key, one in described.items()
        if isinstance(one, TensorStorageMetadata)
    }
    torch_checkpoint.load(found, storage_reader=reader, no_dist=True)
    vocabulary = ("word_embeddings.weight", "output_layer.weight")
    return {key: one[:VOCABULARY] if key.endswith(vocabulary) else one for key, one in found.items()}


def assert_equal(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert set(found) == set(expected)
    for key, values in expected.items():
        assert torch.equal(found[key], values), key
