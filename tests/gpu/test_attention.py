"""Block kernels and whole attention on the GPU against dense attention in float64."""

from __future__ import annotations

import pytest
import torch

from megalong.attention.kernels import CUDNN, FLASH, TILED, BlockKernel, choose_kernel
from megalong.attention.mask import CAUSAL
from tests.attention.reference import Case, assert_near, dense, random_case
from tests.attention.workers import Setting, attend

SHAPES = [
    {"length": 64, "batch": 2, "groups": 2, "group_size": 4, "head_dim": 64},
    {"length": 257, "batch": 1, "groups": 8, "group_size": 4, "head_dim": 128},
    {"length": 1000, "batch": 1, "groups": 1, "group_size": 1, "head_dim": 40},
]


def on_gpu(case: Case) -> Case:
    return Case(case.q.cuda(), case.k.cuda(), case.v.cuda(), case.grad.cuda(), case.scale)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(
    ("kernel", "dtype"),
    [(CUDNN, torch.bfloat16), (FLASH, torch.bfloat16), (TILED, torch.bfloat16), (TILED, torch.float32)],
)
def test_block_kernels(kernel: BlockKernel, dtype: torch.dtype, shape: dict[str, int]) -> None:
    case = random_case(0, dtype=dtype, **shape)
    gpu = on_gpu(case)
    out, lse = kernel.forward(gpu.q, gpu.k, gpu.v, CAUSAL, gpu.scale)
    gradients = kernel.backward(gpu.grad, gpu.q, gpu.k, gpu.v, out, lse, CAUSAL, gpu.scale)
    assert_near([t.cpu() for t in (out, *gradients)], dense(case), dtype)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_attention_and_its_gradients(dtype: torch.dtype) -> None:
    """Short documents go through the variable-length kernel, a window through the banded one."""
    kernel = FLASH if dtype == torch.bfloat16 else TILED
    starts = ((0, 1, 2, 50, 51, 200, 383), (0, 100))
    for window in (None, 1, 70):
        setting = Setting(1, 384, 2, 4, 128, starts, dtype, window)
        ours = attend(on_gpu(setting.case()), setting.plan(1), window=window, kernel=kernel)
        assert_near([t.cpu() for t in ours], dense(setting.case(), setting.rows, window), dtype)


def test_hopper_computes_with_cudnn() -> None:
    if torch.cuda.get_device_capability() < (9, 0):
        pytest.skip("older than Hopper")
    assert choose_kernel(torch.empty(1, 1, 1, 128, dtype=torch.bfloat16, device="cuda")) is CUDNN
