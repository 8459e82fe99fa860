"""SwiGLU and its hand-written backward against torch's own operations in float64."""

from collections.abc import Iterator

import pytest
import torch
import torch.nn.functional as F

from megalong.model import swiglu as module
from megalong.model.swiglu import swiglu, why_not_compiled


def reference(gate_up: torch.Tensor, upstream: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    exact = gate_up.detach().double().requires_grad_()
    gate, up = exact.chunk(2, dim=-1)
    result = F.silu(gate) * up
    result.backward(upstream.double())
    assert exact.grad is not None
    return result.detach(), exact.grad


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.bfloat16, 2e-2)])
@pytest.mark.parametrize("shape", [(7, 2, 6), (1, 1, 2), (33, 3, 64)])
def test_value_and_gradient(
    shape: tuple[int, ...], dtype: torch.dtype, tolerance: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(module.TILE_ELEMENTS, "cpu", 100)  # several tiles, the last one shorter
    gate_up = torch.randn(shape).to(dtype).requires_grad_()
    upstream = torch.randn(*shape[:-1], shape[-1] // 2).to(dtype)
    result = swiglu(gate_up)
    result.backward(upstream)
    expected, gradient = reference(gate_up, upstream)
    assert result.dtype == dtype
    assert gate_up.grad is not None
    torch.testing.assert_close(result.detach().double(), expected, rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(gate_up.grad.double(), gradient, rtol=tolerance, atol=tolerance)


def test_a_gradient_that_is_not_contiguous() -> None:
    """Autograd hands on expanded gradients, as that of a sum."""
    gate_up = torch.randn(5, 2, 8, requires_grad=True)
    swiglu(gate_up).sum().backward()
    _, gradient = reference(gate_up, torch.ones(5, 2, 4))
    assert gate_up.grad is not None
    torch.testing.assert_close(gate_up.grad.double(), gradient, rtol=1e-6, atol=1e-6)


@pytest.fixture
def untried() -> Iterator[None]:
    """No earlier test's answer to whether the compiled kernel works."""
    why_not_compiled.cache_clear()
    yield
    why_not_compiled.cache_clear()


@pytest.mark.usefixtures("untried")
def test_a_kernel_that_works_is_used() -> None:
    """Megatron-Core's, here without its compiler, has the value and gradient of ours."""
    assert why_not_compiled(torch.device("cpu")) is None


@pytest.mark.usefixtures("untried")
def test_a_node_without_a_compiler_computes_in_plain_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch.compile is real here, only its compiler is missing."""
    from torch._inductor import config

    monkeypatch.setattr(config.cpp, "cxx", ("no-such-compiler",))
    monkeypatch.setattr(config, "force_disable_caches", True)
    compiled = torch.compile(lambda x, bias: F.silu(x.chunk(2, -1)[0]) * x.chunk(2, -1)[1])
    monkeypatch.setattr(module, "bias_swiglu_impl", compiled)
    why = why_not_compiled(torch.device("cpu"))
    assert why is not None
    assert "compiler" in why.lower()


@pytest.mark.usefixtures("untried")
def test_a_kernel_that_is_wrong_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "bias_swiglu_impl", lambda x, bias: x.chunk(2, -1)[0] * x.chunk(2, -1)[1])
    assert why_not_compiled(torch.device("cpu")) is not None
