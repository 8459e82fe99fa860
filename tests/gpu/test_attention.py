"""Block kernels and whole attention on the GPU against dense attention in float64."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from megalong.attention import cudnn_kernel
from megalong.attention.kernels import CUDNN, FLASH, TILED, BlockKernel, choose_kernel
from megalong.attention.mask import CAUSAL
from tests.attention.reference import Case, assert_near, dense, random_case
from tests.attention.workers import Setting, attend

SHAPES = [
    {"length": 64, "batch": 2, "groups": 2, "group_size": 4, "head_dim": 64},
    {"length": 257, "batch": 1, "groups": 8, "group_size": 4, "head_dim": 128},
    {"length": 1000, "batch": 1, "groups": 1, "group_size": 1, "head_dim": 40},
    # Whole multiples of 256 tokens, which cuDNN computes itself: it leaves the others to flash.
    {"length": 256, "batch": 2, "groups": 2, "group_size": 4, "head_dim": 128},
    {"length": 1024, "batch": 1, "groups": 1, "group_size": 4, "head_dim": 64},
]


def on_gpu(case: Case) -> Case:
    return Case(case.q.cuda(), case.k.cuda(), case.v.cuda(), case.grad.cuda(), case.scale)


def refuse_older_than_hopper() -> None:
    if torch.cuda.get_device_capability() < (9, 0):
        pytest.skip("older than Hopper")


def cudnn_calls(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The calls of cuDNN's own operators from here on: without them flash has computed, with the same result."""
    ran: list[str] = []

    def noted(name: str) -> Callable[..., Any]:
        operator = getattr(cudnn_kernel, name)

        def call(*arguments: Any, **options: Any) -> Any:
            ran.append(name)
            return operator(*arguments, **options)

        return call

    for name in ("_FORWARD", "_BACKWARD"):
        monkeypatch.setattr(cudnn_kernel, name, noted(name))
    return ran


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(
    ("kernel", "dtype"),
    [(CUDNN, torch.bfloat16), (FLASH, torch.bfloat16), (TILED, torch.bfloat16), (TILED, torch.float32)],
)
def test_block_kernels(
    kernel: BlockKernel, dtype: torch.dtype, shape: dict[str, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    if kernel is CUDNN:
        refuse_older_than_hopper()
    ran = cudnn_calls(monkeypatch)
    case = random_case(0, dtype=dtype, **shape)
    gpu = on_gpu(case)
    out, lse = kernel.forward(gpu.q, gpu.k, gpu.v, CAUSAL, gpu.scale)
    gradients = kernel.backward(gpu.grad, gpu.q, gpu.k, gpu.v, out, lse, CAUSAL, gpu.scale)
    assert_near([t.cpu() for t in (out, *gradients)], dense(case), dtype)
    itself = kernel is CUDNN and shape["length"] % cudnn_kernel.REGULAR == 0
    assert ran == (["_FORWARD", "_BACKWARD"] if itself else [])


def test_attention_by_cudnn(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows of one document each: their block is what cuDNN takes."""
    refuse_older_than_hopper()
    ran = cudnn_calls(monkeypatch)
    setting = Setting(1, 512, 2, 4, 128, ((0,), (0,)), torch.bfloat16)
    ours = attend(on_gpu(setting.case()), setting.plan(1), kernel=CUDNN)
    assert_near([t.cpu() for t in ours], dense(setting.case(), setting.rows), torch.bfloat16)
    assert set(ran) == {"_FORWARD", "_BACKWARD"}


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
    refuse_older_than_hopper()
    assert choose_kernel(torch.empty(1, 1, 1, 128, dtype=torch.bfloat16, device="cuda")) is CUDNN
