"""Transformer Engine on the GPU: its attention in bf16 and FP8 against float64, and FP8 training beside bf16."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from megalong.attention.exchange import ContextGroups
from megalong.attention.layout import TokenLayout
from megalong.attention.plan import make_plan
from megalong.attention.transformer_engine import EngineAttention, machine_of
from tests.attention.reference import Case, assert_near, dense, random_case
from tests.llama import make_dataset, make_llama, run_settings
from tests.training.workers import train_steps

DOCUMENTS = [np.array([0, 1, 100, 256]), np.array([0, 300])]
# Twice what the emulation is allowed (tests/attention/test_fp8.py): scales here are those of the pass before.
FP8_ERROR = [2**-3] + 3 * [2**-2]


def attend(case: Case, starts: list[np.ndarray] | None, window: int | None) -> list[torch.Tensor]:
    length, _, heads, channels = case.q.shape
    engine = EngineAttention(heads, case.k.shape[2], channels, case.scale, window, 1, ContextGroups(), None)
    leaves = [t.cuda().requires_grad_() for t in (case.q, case.k, case.v)]
    out = engine(*leaves, make_plan(TokenLayout(), length, starts))
    return [t.detach().cpu() for t in (out, *torch.autograd.grad(out, leaves, case.grad.cuda()))]


@pytest.mark.parametrize(("starts", "window"), [(None, None), (DOCUMENTS, None), (None, 33), (DOCUMENTS, 33)])
def test_bf16_attention(starts: list[np.ndarray] | None, window: int | None) -> None:
    case = random_case(0, 512, 2, 2, 4, 128, torch.bfloat16)
    assert_near(attend(case, starts, window), dense(case, starts, window), torch.bfloat16)


def test_fp8_attention() -> None:
    """Delayed scaling: the first passes find the scales."""
    from transformer_engine.common.recipe import DelayedScaling
    from transformer_engine.pytorch import autocast

    case = random_case(1, 512, 1, 2, 4, 128, torch.bfloat16)
    engine = EngineAttention(8, 2, 128, case.scale, None, 1, ContextGroups(), None)
    plan = make_plan(TokenLayout(), 512)
    leaves = [t.cuda().requires_grad_() for t in (case.q, case.k, case.v)]
    for _ in range(4):
        with autocast(enabled=True, recipe=DelayedScaling(amax_history_len=1, fp8_dpa=True)):
            out = engine(*leaves, plan)
        results = [out, *torch.autograd.grad(out, leaves, case.grad.cuda())]
    for ours, true, most in zip(results, dense(case), FP8_ERROR, strict=True):
        error = float((ours.detach().cpu().double() - true).norm() / true.norm())
        assert 2**-9 < error < most


@pytest.mark.parametrize(
    "precision",
    [
        {"fp8": "hybrid"},
        {"fp8": "hybrid", "fp8_recipe": "tensorwise"},
        {"fp8": "hybrid", "fp8_dot_product_attention": True},
    ],
    ids=["delayed", "tensorwise", "attention"],
)
@pytest.mark.parametrize("recompute", ["none", "full"])
def test_fp8_steps_stay_near_bf16(
    recompute: str, precision: dict[str, Any], tmp_path: Path, gpu_world: torch.device
) -> None:
    assert machine_of(gpu_world).has_engine
    shape: dict[str, Any] = {"hidden_size": 256, "intermediate_size": 512, "head_dim": 128, "num_attention_heads": 2}
    hf = make_llama(tmp_path / "hf", num_hidden_layers=2, num_key_value_heads=1, max_position_embeddings=128, **shape)
    data = make_dataset(tmp_path / "data")

    def losses(name: str, **settings: Any) -> list[float]:
        precision = {"params_dtype": "bf16", **settings}
        tree = run_settings(tmp_path / name, hf, data, precision=precision, memory={"recompute": recompute})
        tree["data"]["seq_length"] = 128
        return train_steps(tree, 10, str(gpu_world))["loss"]

    assert losses("fp8", **precision) == pytest.approx(losses("bf16"), rel=2e-2)


def test_a_training_run_on_its_attention(tmp_path: Path, gpu_world: torch.device) -> None:
    """The same losses as with our kernels, in bf16."""
    heads = {"num_attention_heads": 4, "num_key_value_heads": 1, "head_dim": 128}
    hf = make_llama(tmp_path / "hf", num_hidden_layers=2, max_position_embeddings=256, **heads)
    data = make_dataset(tmp_path / "data", documents=200)

    def losses(backend: str) -> list[float]:
        precision, attention = {"params_dtype": "bf16"}, {"backend": backend}
        tree = run_settings(tmp_path / backend, hf, data, precision=precision, attention=attention)
        tree["data"] |= {"packing": "masked", "seq_length": 256}
        return train_steps(tree, 10, str(gpu_world))["loss"]

    assert losses("transformer_engine") == pytest.approx(losses("torch"), rel=1e-2)
