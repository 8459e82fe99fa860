"""Keep calls below the 32-bit limits of CUDA kernels.

    kernel   what is counted in 32 bits                                  what is done
    cuDNN    elements of a tensor (assumed: it is not documented)        flash computes the block
    flash    backward: tokens x query heads x channels of its float32    query heads are split into several calls
             buffer of query gradients, tokens and channels rounded up

FlashAttention addresses q, k, v and the result in 64 bits, but up to version 2.8.0 it computes offsets into that one
buffer as 32-bit integers: 1M tokens of 32 heads of 128 channels are 2^32, and gradients are written outside the buffer
without an error. Heads are independent, so splitting them costs only launches. Cumulative lengths of documents are
int32 everywhere: they count tokens, and a rank has far fewer than 2^31. The same holds for the b x h x n entries of the
log-sum-exp.
Source: flash_bwd_kernel.h and flash_bwd_preprocess_kernel.h of FlashAttention 2.7.4, which torch is built with.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from megalong.errors import UserError

COUNTABLE = 2**31

Gradients = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


def is_countable(*tensors: torch.Tensor) -> bool:
    """Whether all elements of each tensor lie within 2^31 elements of the first, strides included."""
    return all(max(_reach(tensor), tensor.numel()) < COUNTABLE for tensor in tensors)


def _reach(tensor: torch.Tensor) -> int:
    return 1 + sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))


def by_heads(
    backward: Callable[..., Gradients],
    grad_out: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    per_head: int,
) -> Gradients:
    """`backward(grad_out, q, k, v, out, lse)`, over as many query heads at a time as flash can count.

    Args:
        grad_out, q, k, v, out: heads in the last dimension but one; `lse` too.
        per_head: elements that one query head adds to flash's buffer.

    Raises:
        UserError: one head alone is too long.
    """
    heads, groups = q.shape[-2], k.shape[-2]
    count = _heads_at_once(heads, heads // groups, per_head)
    if count == heads:
        return backward(grad_out, q, k, v, out, lse)
    grad_q = torch.empty_like(q)
    grad_k, grad_v = (torch.zeros_like(t, dtype=torch.float32) for t in (k, v))
    for first in range(0, heads, count):
        mine = slice(first, first + count)
        theirs = slice(first * groups // heads, (first + count - 1) * groups // heads + 1)
        of_q, of_k = (..., mine, slice(None)), (..., theirs, slice(None))
        dq, dk, dv = backward(grad_out[of_q], q[of_q], k[of_k], v[of_k], out[of_q], lse[of_q])
        grad_q[of_q] = dq
        grad_k[of_k] += dk
        grad_v[of_k] += dv
    return grad_q, grad_k, grad_v


def _heads_at_once(heads: int, group_size: int, per_head: int) -> int:
    """The most heads that fit: whole groups, or an equal part of one."""
    most = (COUNTABLE - 1) // per_head
    fitting = [
        n for n in range(1, min(heads, most) + 1) if heads % n == 0 and (n % group_size == 0 or group_size % n == 0)
    ]
    if not fitting:
        raise UserError(
            f"attention: {per_head:,} elements of one head on one GPU are more than FlashAttention can count "
            "(2^31); write a larger parallel.context_parallel_size"
        )
    return fitting[-1]
