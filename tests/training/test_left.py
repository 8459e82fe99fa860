"""A run that has ended leaves nothing of its model in the process: a rollback and the next stage need the memory."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.llama import make_dataset, make_llama, single_sample_settings
from tests.pool import WorkerPool

INTERLEAVED = {"pipeline_model_parallel_size": 2, "virtual_pipeline_model_parallel_size": 2}
KINDS: dict[str, dict[str, Any]] = {
    "DP2": {"memory": {"recompute": "full"}, "evaluation": {"interval": 1}, "checkpoint": {"save_interval": 1}},
    "PP2 interleaved": {"parallel": INTERLEAVED},
    "CP2 LoRA": {
        "parallel": {"context_parallel_size": 2},
        "lora": {"rank": 2, "target_modules": ["q_proj", "down_proj"]},
    },
    "TP2 FP8": {
        "parallel": {"tensor_model_parallel_size": 2},
        "precision": {"params_dtype": "bf16", "fp8": "hybrid"},
    },
}


@pytest.mark.parametrize("kind", KINDS)
def test_no_model_is_left(kind: str, tmp_path: Path, pool: WorkerPool) -> None:
    llama, data = make_llama(tmp_path / "hf"), make_dataset(tmp_path / "data")
    changes = KINDS[kind] | {"training": {"train_iters": 3}}
    runs = [single_sample_settings(tmp_path / name, llama, data, **changes) for name in ("first", "second")]
    assert pool.run(2, "tests.training.workers:models_left", runs) == [[0, 0]] * 2
