"""Products of bf16 through float32: rounded once, at any shape and stride, and in every linear layer of a model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from megalong.model import cpu_bf16
from tests.llama import VOCABULARY, make_llama
from tests.pool import WorkerPool

SHAPES = [((5, 7), 3), ((1, 2, 64), 96), ((33, 2048), 17), ((0, 4), 2), ((3, 0), 2)]


def with_capability(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: name)


def numbers(*shape: int, strided: bool) -> torch.Tensor:
    tensor = torch.randn(shape)
    return (tensor.mT.contiguous().mT if strided else tensor).bfloat16().requires_grad_()


@pytest.mark.parametrize("strided", [False, True])
@pytest.mark.parametrize(("shape", "rows"), SHAPES)
def test_a_product_and_its_gradients_are_rounded_once(
    shape: tuple[int, ...], rows: int, strided: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    with_capability(monkeypatch, "AVX2")
    torch.manual_seed(0)
    input, weight = (numbers(*size, strided=strided) for size in (shape, (rows, shape[-1])))
    grad = numbers(*shape[:-1], rows, strided=strided).detach()
    ours = cpu_bf16.linear(input, weight)
    ours = [ours.detach(), *torch.autograd.grad(ours, (input, weight), grad)]
    exact = F.linear(input.double(), weight.double())
    truth = [exact.detach(), *torch.autograd.grad(exact, (input, weight), grad.double())]
    for mine, theirs in zip(ours, truth, strict=True):
        assert mine.dtype == torch.bfloat16
        assert mine.shape == theirs.shape
        # autograd rounds the float64 gradient to bf16 too; so both are within half a unit of the last place.
        torch.testing.assert_close(mine.double(), theirs.double(), rtol=2**-7, atol=1e-4)


def test_a_frozen_weight_keeps_no_input(monkeypatch: pytest.MonkeyPatch) -> None:
    with_capability(monkeypatch, "AVX2")
    input, weight = numbers(3, 4, strided=False), numbers(2, 4, strided=False).detach()
    kept: list[Any] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):  # type: ignore[func-returns-value]
        out = cpu_bf16.linear(input, weight)
    assert [tuple(tensor.shape) for tensor in kept] == [(2, 4)]
    (grad,) = torch.autograd.grad(out.sum(), input)
    assert torch.equal(grad, weight.sum(0).expand(3, 4))


@pytest.mark.parametrize(("capability", "dtype"), [("AVX512", torch.bfloat16), ("AVX2", torch.float32)])
def test_other_products_are_torchs(capability: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    with_capability(monkeypatch, capability)
    assert not cpu_bf16.widens(torch.device("cpu"), dtype)
    input, weight = torch.randn(5, 64).to(dtype), torch.randn(3, 64).to(dtype)
    assert torch.equal(cpu_bf16.linear(input, weight), F.linear(input, weight))


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("parallel", [{}, {"tensor": 2}], ids=["one process", "TP2 SP"])
def test_a_model_computes_the_same_through_float32(
    parallel: dict[str, int], tied: bool, pool: WorkerPool, tmp_path: Path
) -> None:
    """Against Megatron-Core's own layers: losses, and the gradients of weights at both ends of the model."""
    hf = str(make_llama(tmp_path / "hf", dtype=torch.bfloat16, tie_word_embeddings=tied))
    tokens = np.random.default_rng(0).integers(0, VOCABULARY, (2, 33)).tolist()
    world = parallel.get("tensor", 1)
    own, widened = (
        pool.run(world, "tests.model.workers:bf16_losses", hf, tokens, parallel, capability)
        for capability in ("AVX512", "AVX2")
    )
    for theirs, ours in zip(own, widened, strict=True):
        assert theirs["classes"] == ["ColumnParallelLinear", "RowParallelLinear"]
        assert ours["classes"] == ["WidenedColumnParallelLinear", "WidenedRowParallelLinear"]
        torch.testing.assert_close(ours["losses"], theirs["losses"], rtol=2**-6, atol=2**-6)
        assert theirs["gradients"].keys() == ours["gradients"].keys()
        for name, gradient in theirs["gradients"].items():
            apart = (ours["gradients"][name] - gradient).norm() / gradient.norm()
            assert apart <= 2**-5, name
