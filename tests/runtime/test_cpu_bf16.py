"""Products of bf16 through float32: rounded once, at any shape and stride, and nothing else is touched."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from megalong.runtime import cpu_bf16
from tests.pool import WorkerPool

SHAPES = [((5, 7), (7, 3)), ((1, 64), (64, 96)), ((33, 2048), (2048, 17)), ((0, 4), (4, 2)), ((3, 0), (0, 2))]


def products(capability: str) -> dict[str, Any]:
    """On a worker that ends afterwards: what `install` says and what products are then."""
    torch.manual_seed(0)
    torch.backends.cpu.get_cpu_capability = lambda: capability  # type: ignore[assignment]
    wide = torch.randn(33, 2048, dtype=torch.bfloat16)
    before = wide @ wide.t()
    answers = [cpu_bf16.serve(torch.bfloat16), cpu_bf16.serve(torch.bfloat16)]
    apart, types, same = [], set(), True
    for left, right in SHAPES:
        a, b = torch.randn(left), torch.randn(right)
        exact = a.bfloat16().double() @ b.bfloat16().double()
        for one, other in ((a, b), (a.t().contiguous().t(), b.t().contiguous().t())):
            found = one.bfloat16() @ other.bfloat16()
            types.add(found.dtype)
            same &= torch.equal(found, (one.bfloat16().float() @ other.bfloat16().float()).bfloat16())
            apart.append(((found.double() - exact).abs() - exact.abs() * 2**-8).max().item() if exact.numel() else 0)
    tokens = torch.randn(6, 2, 7, dtype=torch.bfloat16, requires_grad=True)
    weight = torch.randn(5, 7, dtype=torch.bfloat16, requires_grad=True)
    torch.matmul(tokens, weight.t()).sum().backward()
    assert tokens.grad is not None
    assert weight.grad is not None
    there = cpu_bf16._library is not None
    gone = [cpu_bf16.serve(torch.float32), cpu_bf16._library is not None]
    back = torch.equal(wide @ wide.t(), before)
    again = cpu_bf16.serve(torch.bfloat16)
    long = torch.ones(2, 3, dtype=torch.int64)
    return {
        "answers": answers,
        "there": there,
        "gone": gone,
        "back": back,
        "again": again,
        "apart": max(apart),
        "types": types,
        "same": same,
        "grads": [tokens.grad.float() - weight.detach().float().sum(0), weight.grad.float()],
        "weight_grad": tokens.detach().float().sum((0, 1)).expand(5, 7),
        "float64": ((torch.ones(2, 3).double() / 3) @ torch.ones(3, 2).double() - 1).abs().max().item(),
        "int64": (long @ long.t()).tolist(),
    }


@pytest.mark.parametrize(("capability", "replaced"), [("AVX2", True), ("AVX512", False)])
def test_products(capability: str, replaced: bool) -> None:
    with WorkerPool(1) as alone:
        found = alone.run(1, "tests.runtime.test_cpu_bf16:products", capability)[0]
    assert found["answers"] == [replaced, replaced]
    assert (found["there"], found["again"]) == (replaced, replaced)
    assert found["gone"] == [False, False]
    assert found["back"]
    assert found["same"] or not replaced
    assert found["types"] == {torch.bfloat16}
    assert found["apart"] <= 1e-4
    assert found["grads"][0].abs().max() <= 0.05
    assert torch.allclose(found["grads"][1], found["weight_grad"], rtol=2**-7, atol=0.05)
    assert found["float64"] <= 1e-15
    assert found["int64"] == [[3, 3], [3, 3]]
