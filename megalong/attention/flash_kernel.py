"""FlashAttention-2 as built into torch: bf16 and fp16 on CUDA, any block a plan has (plan.py).

It counts diagonals from the bottom right corner, where the last query meets the last key (varlen.py says them so).
"""

from __future__ import annotations

import torch

from megalong.attention.mask import BlockMask
from megalong.attention.varlen import no_random_state, to_corner, window_arguments


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
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """See `BlockKernel.backward`. The kernel reads the log-sum-exp by address, so a slice of it is copied first."""
    grads = torch.ops.aten._flash_attention_backward(
        *_batch_first(grad_out, q, k, v, out),
        lse.contiguous(),
        None,  # no ragged batch, so no bounds of its sequences
        None,
        q.shape[0],
        k.shape[0],
        0.0,
        False,
        *no_random_state(q.device),
        scale=scale,
        **window_arguments(to_corner(mask, q.shape[0], k.shape[0])),
    )
    dq, dk, dv = (grad.transpose(0, 1) for grad in grads)
    return dq, dk, dv


def _batch_first(*tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """`[s, b, h, d]` seen as flash's `[b, s, h, d]`; it reads any strides but that of the last dimension."""
    return tuple((t if t.stride(-1) == 1 else t.contiguous()).transpose(0, 1) for t in tensors)
