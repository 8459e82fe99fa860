"""Block kernels against dense float64: one block, several blocks merged, and how a kernel is chosen."""

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megalong.attention import cudnn_kernel, tiled
from megalong.attention.kernels import CPU, CUDNN, FLASH, TILED, BlockKernel, choose_kernel, kernel_of
from megalong.attention.mask import CAUSAL, FULL, BlockMask
from tests.attention.reference import Case, assert_near, dense, random_case

KERNELS = pytest.mark.parametrize("kernel", [CPU, TILED], ids=lambda kernel: kernel.name)
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
SHAPES: dict[str, Any] = {
    "length": st.integers(1, 150),
    "batch": st.integers(1, 3),
    "groups": st.integers(1, 3),
    "group_size": st.integers(1, 8),
    "head_dim": st.integers(1, 33).map(lambda half: 2 * half),
    "seed": st.integers(0, 1000),
}


@KERNELS
@DTYPES
@settings(max_examples=25, deadline=None)
@given(**SHAPES)
def test_causal_block(kernel: BlockKernel, dtype: torch.dtype, **shape: int) -> None:
    case = random_case(dtype=dtype, **shape)
    out, lse = kernel.forward(case.q, case.k, case.v, CAUSAL, case.scale)
    gradients = kernel.backward(case.grad, case.q, case.k, case.v, out, lse, CAUSAL, case.scale)
    assert out.dtype == dtype
    assert lse.dtype == torch.float32
    assert_near([out, *gradients], dense(case), dtype)


@KERNELS
@DTYPES
def test_blocks_of_a_causal_sequence_add_up(kernel: BlockKernel, dtype: torch.dtype) -> None:
    """Late queries to early keys (no mask) and to their own (causal): backward from the merged log-sum-exp alone."""
    case = random_case(5, length=96, batch=2, groups=2, group_size=4, head_dim=16, dtype=dtype)
    early, late = slice(0, 40), slice(40, None)
    queries, grad = case.q[late], case.grad[late]
    blocks = [(early, FULL), (late, CAUSAL)]
    parts = [kernel.forward(queries, case.k[keys], case.v[keys], mask, case.scale) for keys, mask in blocks]
    lse = torch.logaddexp(parts[0][1], parts[1][1])
    shares = [torch.exp(part_lse - lse).permute(2, 0, 1)[..., None] for _, part_lse in parts]
    out = (shares[0] * parts[0][0].float() + shares[1] * parts[1][0].float()).to(dtype)
    grads = [
        kernel.backward(grad, queries, case.k[keys], case.v[keys], out, lse, mask, case.scale) for keys, mask in blocks
    ]
    truth = dense(_without_gradient(case, early))
    ours = [out, grads[0][0].float() + grads[1][0].float()]
    ours += [torch.cat((grads[0][i], grads[1][i])) for i in (1, 2)]
    assert_near(ours, [truth[0][late], truth[1][late], *truth[2:]], dtype)


def _without_gradient(case: Case, rows: slice) -> Case:
    grad = case.grad.clone()
    grad[rows] = 0
    return Case(case.q, case.k, case.v, grad, case.scale)


def test_the_tiles_of_the_plain_kernel_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    case = random_case(7, length=50, batch=2, groups=2, group_size=2, head_dim=8, dtype=torch.float32)
    monkeypatch.setattr(tiled, "SCORES_PER_TILE", 2 * 4 * 50 * 7)  # seven rows a tile, one in the last
    for mask in (CAUSAL, FULL, BlockMask(3, -2), BlockMask(-5, None)):
        out, lse = TILED.forward(case.q, case.k, case.v, mask, case.scale)
        ours = [out, lse, *TILED.backward(case.grad, case.q, case.k, case.v, out, lse, mask, case.scale)]
        out, lse = CPU.forward(case.q, case.k, case.v, mask, case.scale)
        theirs = [out, lse, *CPU.backward(case.grad, case.q, case.k, case.v, out, lse, mask, case.scale)]
        for mine, other in zip(ours, theirs, strict=True):
            torch.testing.assert_close(mine.float(), other.float(), rtol=1e-5, atol=1e-5)


class OnCuda:
    """As much of a CUDA tensor as the choice looks at."""

    def __init__(self, dtype: torch.dtype, head_dim: int) -> None:
        self.dtype, self.shape, self.device = dtype, (4, 1, 2, head_dim), torch.device("cuda", 0)


def test_the_kernel_follows_device_type_and_head_dimension(monkeypatch: pytest.MonkeyPatch) -> None:
    def chosen(dtype: torch.dtype, head_dim: int) -> BlockKernel:
        return choose_kernel(OnCuda(dtype, head_dim))  # type: ignore[arg-type]

    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (9, 0))
    monkeypatch.setattr(
        cudnn_kernel, "_failure", lambda device, dtype, head_dim: None if dtype == torch.bfloat16 else "it is broken"
    )
    assert choose_kernel(torch.empty(4, 1, 2, 8)) is CPU
    assert chosen(torch.bfloat16, 128) is CUDNN
    assert chosen(torch.float16, 128) is chosen(torch.bfloat16, 256) is FLASH
    assert chosen(torch.float32, 128) is chosen(torch.bfloat16, 20) is chosen(torch.bfloat16, 512) is TILED
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (8, 0))
    assert chosen(torch.bfloat16, 128) is FLASH
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (7, 5))
    assert chosen(torch.bfloat16, 128) is TILED


def test_cudnn_that_cannot_is_left_alone(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    """On this machine neither it nor flash runs at all: one warning, and the reason is kept for whoever asks."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (9, 0))
    cudnn_kernel._failure.cache_clear()
    for _ in range(2):
        assert str(cudnn_kernel.refusal(torch.empty(4, 1, 2, 64, dtype=torch.bfloat16))).startswith(
            "cuDNN's attention fails its check on this machine: "
        )
    assert caplog.text.count("not using cuDNN attention") == 1
    cudnn_kernel._failure.cache_clear()


def test_the_choice_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (9, 0))
    monkeypatch.setattr(cudnn_kernel, "_failure", lambda device, dtype, head_dim: None)

    def reason(dtype: torch.dtype, head_dim: int) -> str:
        choice = kernel_of(OnCuda(dtype, head_dim))  # type: ignore[arg-type]
        return f"{choice.kernel.name}: {choice.reason}"

    assert reason(torch.bfloat16, 128).startswith("cudnn: checked against flash; it computes whole and causal blocks")
    assert reason(torch.bfloat16, 256) == (
        "flash: cuDNN's attention supports heads of up to 128 channels, these have 256"
    )
    assert reason(torch.float32, 128) == (
        "tiled: in plain torch, slowly: fused kernels support bf16 and fp16, not float32"
    )
    assert "heads of 8, 16, ... 256 channels, not 20" in reason(torch.bfloat16, 20)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (8, 0))
    assert reason(torch.bfloat16, 128) == "flash: cuDNN's attention is faster only from Hopper on"
