"""Backward cut by heads is backward; how it is cut."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from megalong.attention import flash_kernel, limits, varlen
from megalong.attention.kernels import CPU
from megalong.attention.limits import by_heads
from megalong.attention.mask import CAUSAL
from megalong.errors import UserError
from tests.attention.reference import assert_near, dense, random_case


@pytest.mark.parametrize(
    ("groups", "group_size", "fitting", "cut_into"),
    [(2, 4, 8, 1), (2, 4, 5, 2), (2, 4, 3, 4), (2, 4, 1, 8), (3, 2, 5, 3), (1, 4, 2, 2), (4, 1, 3, 2), (6, 2, 4, 3)],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_heads_are_cut_and_add_up(
    groups: int, group_size: int, fitting: int, cut_into: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    case = random_case(0, 70, 2, groups, group_size, 8, dtype)
    out, lse = CPU.forward(case.q, case.k, case.v, CAUSAL, case.scale)
    calls = []

    def backward(*tensors: torch.Tensor) -> Any:
        calls.append(tensors[1].shape[2])
        return CPU.backward(*tensors, CAUSAL, case.scale)

    per_head = 100
    monkeypatch.setattr(limits, "COUNTABLE", per_head * fitting + 1)
    grads = by_heads(backward, case.grad, case.q, case.k, case.v, out, lse, per_head)
    assert_near([out, *grads], dense(case), dtype)
    assert calls == [groups * group_size // cut_into] * cut_into


@pytest.mark.parametrize(("tokens", "heads", "calls"), [(2**20, 32, 4), (2**22 - 128, 4, 1), (2**22, 4, 2)])
def test_flash_counts_tokens_heads_and_channels(
    tokens: int, heads: int, calls: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """1M tokens of 32 heads of 128 channels are 2^32 numbers, 4M of 4 are 2^31."""
    q, k = (torch.empty(tokens, 1, h, 128, dtype=torch.bfloat16, device="meta") for h in (heads, heads // 4))
    lse = torch.empty(1, heads, tokens, device="meta")
    seen = []
    real = flash_kernel._backward
    monkeypatch.setattr(flash_kernel, "_backward", lambda *a: seen.append(a[2].shape) or real(*a))  # type: ignore[func-returns-value]
    grads = flash_kernel.backward(q, q, k, k, q, lse, CAUSAL, 0.1)
    assert [g.shape for g in grads] == [q.shape, k.shape, k.shape]
    assert seen == [(tokens, 1, heads // calls, 128)] * calls
    assert tokens * heads // calls * 128 < 2**31


def test_documents_are_padded_in_that_buffer(monkeypatch: pytest.MonkeyPatch) -> None:
    """128 tokens lie between one document and the next: 2^18 documents of one token are more than 2^25 of them."""
    documents = 2**18
    q = torch.empty(documents, 2, 16, dtype=torch.bfloat16, device="meta")
    bounds = torch.empty(documents + 1, dtype=torch.int32, device="meta")
    packed = varlen.PackedBlocks((-1, 0), slice(None), slice(None), bounds, bounds, 1, 1)
    seen = []
    real = varlen._backward
    monkeypatch.setattr(varlen, "_backward", lambda *a: seen.append(a[3].shape[1]) or real(*a))  # type: ignore[func-returns-value]
    varlen.flash_backward(q, q, q, q, q, torch.empty(2, documents, device="meta"), packed, 0.1)
    assert seen == [1, 1]


def test_a_head_that_is_too_long_is_refused() -> None:
    q = torch.empty(2**24, 1, 2, 128, dtype=torch.bfloat16, device="meta")
    with pytest.raises(UserError, match=r"2,147,483,648 elements of one head .* larger parallel.context_parallel_size"):
        flash_kernel.backward(q, q, q, q, q, torch.empty(1, 2, 2**24, device="meta"), CAUSAL, 0.1)
