"""cuDNN's attention through torch, which on Hopper is known to be faster than FlashAttention-2.

torch gives it two masks, none and causal from the top left corner. Blocks that a diagonal cuts elsewhere, or of odd
shapes, go to flash, whose log-sum-exp means the same, so that both can be merged. What torch was built with, and which
cuDNN it finds, is known only where it runs: first both compute a small block, and cuDNN is left alone if it cannot or
differs.
"""

from __future__ import annotations

import functools
import logging

import torch

from megalong.attention import flash_kernel
from megalong.attention.mask import CAUSAL, FULL, BlockMask

log = logging.getLogger("megalong")

WIDEST_HEAD = 128
REGULAR = 256  # tokens: cuDNN compiles a graph for every shape, and documents come in any number of them
CHECKED = (256, 1, 4, 2)  # tokens, batch, query heads and key heads of the block that both compute
TOLERANCE = 2e-2

_FORWARD = torch.ops.aten._scaled_dot_product_cudnn_attention
_BACKWARD = torch.ops.aten._scaled_dot_product_cudnn_attention_backward


def takes(q: torch.Tensor) -> bool:
    """Whether cuDNN is there, right, and made for tensors like `q` (which flash takes)."""
    if q.shape[-1] > WIDEST_HEAD or torch.cuda.get_device_capability(q.device) < (9, 0):
        return False
    return _agrees_with_flash(q.device, q.dtype, q.shape[-1])


def forward(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: BlockMask, scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """See `BlockKernel.forward`."""
    if not _knows(q, k, mask):
        return flash_kernel.forward(q, k, v, mask, scale)
    out, lse, *_ = _FORWARD(*_heads_first(q, k, v), None, True, 0.0, mask == CAUSAL, False, scale=scale)
    return out.permute(2, 0, 1, 3), lse.squeeze(-1)


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
    """See `BlockKernel.backward`."""
    if not _knows(q, k, mask):
        return flash_kernel.backward(grad_out, q, k, v, out, lse, mask, scale)
    seed = torch.zeros((), dtype=torch.int64, device=q.device)  # of dropout, which there is none of
    grads = _BACKWARD(
        *_heads_first(grad_out, q, k, v, out.to(q.dtype)),
        lse.unsqueeze(-1).contiguous(),
        seed,
        seed,
        None,
        None,
        None,
        q.shape[0],
        k.shape[0],
        0.0,
        mask == CAUSAL,
        scale=scale,
    )
    dq, dk, dv = (grad.permute(2, 0, 1, 3) for grad in grads)
    return dq, dk, dv


def _knows(q: torch.Tensor, k: torch.Tensor, mask: BlockMask) -> bool:
    if q.shape[0] % REGULAR or k.shape[0] % REGULAR:
        return False
    return mask == FULL or (mask == CAUSAL and q.shape[0] == k.shape[0])


def _heads_first(*tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
    return tuple((t if t.stride(-1) == 1 else t.contiguous()).permute(1, 2, 0, 3) for t in tensors)


@functools.cache
def _agrees_with_flash(device: torch.device, dtype: torch.dtype, head_dim: int) -> bool:
    tokens, batch, heads, groups = CHECKED
    generator = torch.Generator(device).manual_seed(0)
    q, k, v, grad = (
        torch.randn(tokens, batch, h, head_dim, device=device, generator=generator).to(dtype)
        for h in (heads, groups, groups, heads)
    )
    try:
        for mask in (FULL, CAUSAL):
            theirs, lse = flash_kernel.forward(q, k, v, mask, 0.1)
            expected = theirs, lse, *flash_kernel.backward(grad, q, k, v, theirs, lse, mask, 0.1)
            out, lse = forward(q, k, v, mask, 0.1)
            ours = out, lse, *backward(grad, q, k, v, out, lse, mask, 0.1)
            for mine, other in zip(ours, expected, strict=True):
                torch.testing.assert_close(mine.float(), other.float(), rtol=TOLERANCE, atol=TOLERANCE)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).strip().splitlines()[0]
        log.warning("cuDNN attention is left alone (%s): flash computes every block", reason)
        return False
    return True
