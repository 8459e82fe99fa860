"""SwiGLU and its hand-written backward against torch's own operations in float64."""

import pytest
import torch
import torch.nn.functional as F

from megalong.model import swiglu as module
from megalong.model.swiglu import swiglu


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
    monkeypatch.setattr(module, "TILE_ELEMENTS", 100)  # several tiles, the last one shorter
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
