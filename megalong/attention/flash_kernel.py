"""FlashAttention-2 as built into torch: bf16 and fp16 on CUDA, for any block of a plan (plan.py).

It counts diagonals from the bottom right corner, where the last query meets the last key (varlen.py converts them). It
accepts any strides, except that the last dimension's must be 1. Backward over very many tokens and heads is split by
heads (limits.py).
"""

from __future__ import annotations

import functools
from typing import Any

import torch

from megalong.attention.limits import Gradients, by_heads
from megalong.attention.mask import BlockMask
from megalong.attention.varlen import no_random_state, rounded_head, to_corner, window_arguments

TILE = 128  # queries: flash rounds their number up to it


def forward(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: BlockMask, scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """See `BlockKernel.forward`."""
    out, lse, *_ = torch.ops.aten._flash_attention_forward(
        *_batch_first(q, k, v),
        None,
        None,
        q.shape[0],
        k.shape[0],
        0.0,
        False,
        False,
        scale=scale,
        **window_arguments(to_corner(mask, q.shape[0], k.shape[0])),
    )
    return out.transpose(0, 1), lse


def backward(
    grad_out: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    mask: BlockMask,
    scale: float,
) -> Gradients:
    """See `BlockKernel.backward`. The kernel ignores the log-sum-exp's strides, so a slice of it is copied first."""
    arguments = {"scale": scale, **window_arguments(to_corner(mask, q.shape[0], k.shape[0]))}
    per_head = -(-q.shape[0] // TILE) * TILE * rounded_head(q.shape[-1])
    return by_heads(functools.partial(_backward, arguments), grad_out, q, k, v, out, lse, per_head)


def _backward(
    arguments: dict[str, Any],
    grad_out: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
) -> Gradients:
    grads = torch.ops.aten._flash_attention_backward(
        *_batch_first(grad_out, q, k, v, out),
        lse.contiguous(),
        None,  # no ragged batch, so no cumulative lengths
        None,
        q.shape[0],
        k.shape[0],
        0.0,
        False,
        *no_random_state(q.device),
        **arguments,
    )
    dq, dk, dv = (grad.transpose(0, 1) for grad in grads)
    return dq, dk, dv


def _batch_first(*tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """`[s, b, h, d]` viewed as flash's `[b, s, h, d]`."""
    return tuple((t if t.stride(-1) == 1 else t.contiguous()).transpose(0, 1) for t in tensors)
