"""Block kernels and whole attention on the GPU against dense attention in float64."""

from __future__ import annotations

import pytest
import torch

from megalong.attention.kernels import FLASH, TILED, BlockKernel
from megalong.attention.ring import ring_attention
from tests.attention.reference import Case, assert_near, dense, random_case

SHAPES = [
    {"length": 64, "batch": 2, "groups": 2, "group_size": 4, "head_dim": 64},
    {"length": 257, "batch": 1, "groups": 8, "group_size": 4, "head_dim": 128},
    {"length": 1000, "batch": 1, "groups": 1, "group_size": 1, "head_dim": 40},
]


def on_gpu(case: Case) -> Case:
    return Case(case.q.cuda(), case.k.cuda(), case.v.cuda(), case.grad.cuda(), case.scale)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(
    ("kernel", "dtype"), [(FLASH, torch.bfloat16), (TILED, torch.bfloat16), (TILED, torch.float32)]
)
def test_block_kernels(kernel: BlockKernel, dtype: torch.dtype, shape: dict[str, int]) -> None:
    case = random_case(0, dtype=dtype, **shape)
    gpu = on_gpu(case)
    out, lse = kernel.forward(gpu.q, gpu.k, gpu.v, True, gpu.scale)
    gradients = kernel.backward(gpu.grad, gpu.q, gpu.k, gpu.v, out, lse, True, gpu.scale)
    assert_near([t.cpu() for t in (out, *gradients)], dense(case), dtype)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_attention_and_its_gradients(dtype: torch.dtype) -> None:
    case = random_case(1, 384, 2, 2, 4, 128, dtype)
    gpu = on_gpu(case)
    leaves = [t.requires_grad_() for t in (gpu.q, gpu.k, gpu.v)]
    out = ring_attention(*leaves, softmax_scale=gpu.scale, group=None)
    gradients = torch.autograd.grad(out, leaves, gpu.grad)
    assert_near([t.detach().cpu() for t in (out, *gradients)], dense(case), dtype)
