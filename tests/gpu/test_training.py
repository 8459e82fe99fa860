"""Ten steps on the GPU are the ten steps of the CPU; bf16 stays near fp32."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.llama import make_dataset, make_llama, run_settings
from tests.pool import WorkerPool
from tests.training.workers import train_steps

STEPS = 10
LENGTH = 256  # the least that cuDNN takes


@pytest.mark.parametrize("recompute", ["none", "full", "selective"])
def test_fp32_steps_equal_the_cpu(recompute: str, tmp_path: Path, pool: WorkerPool, gpu_world: torch.device) -> None:
    settings = run_settings(
        tmp_path / "run", make_llama(tmp_path / "hf"), make_dataset(tmp_path / "data"), memory={"recompute": recompute}
    )
    cpu = pool.run(1, "tests.training.workers:train_steps", settings, STEPS)[0]
    gpu = train_steps(settings, STEPS, str(gpu_world))
    assert gpu["loss"] == pytest.approx(cpu["loss"], rel=1e-4)
    assert gpu["norm"] == pytest.approx(cpu["norm"], rel=1e-3)


def test_bf16_steps_stay_near_fp32(tmp_path: Path, gpu_world: torch.device) -> None:
    """With heads of 128 channels, and samples whose blocks cuDNN computes on a Hopper GPU."""
    heads = {"num_attention_heads": 4, "num_key_value_heads": 1, "head_dim": 128}
    hf = make_llama(tmp_path / "hf", num_hidden_layers=2, max_position_embeddings=LENGTH, **heads)
    data = make_dataset(tmp_path / "data", documents=200)

    def losses(dtype: str) -> list[float]:
        tree = run_settings(tmp_path / dtype, hf, data, precision={"params_dtype": dtype})
        tree["data"]["seq_length"] = LENGTH
        return train_steps(tree, STEPS, str(gpu_world))["loss"]

    assert losses("bf16") == pytest.approx(losses("fp32"), rel=1e-2)
