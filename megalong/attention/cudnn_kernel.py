"""cuDNN's attention through torch, which on Hopper is known to be faster than FlashAttention-2.

torch offers two masks for it, none and causal from the top left corner. Blocks that a diagonal cuts elsewhere, blocks
of odd shapes, and blocks of 2^31 elements or more (limits.py) go to flash, whose log-sum-exp means the same, so that
both can be merged. torch's build and the cuDNN version are known only at run time. So both kernels first compute a
small block, and cuDNN is not used if it fails or differs.

Two things that torch's operators do not document:

- The log-sum-exp is `[b, h, s]` in some releases and `[b, h, s, 1]` in others, and backward wants the shape that
  forward returned. Ours is `[b, h, s]`, merged or not; the number of dimensions from the last forward is remembered.
- torch caches cuDNN's compiled graphs by the shapes and strides of q, k and v alone. A graph compiled for one layout of
  the result and its gradient would silently misread another, so both are always passed in one layout, contiguous as
  `[s, b, h, d]`.
"""

from __future__ import annotations

import functools
import logging

import torch

from megalong.attention import flash_kernel
from megalong.attention.limits import Gradients, is_countable
from megalong.attention.mask import CAUSAL, FULL, BlockMask

log = logging.getLogger("megalong")

WIDEST_HEAD = 128
REGULAR = 256  # tokens: cuDNN compiles a graph per shape, and documents have any number of tokens
CHECKED = (256, 1, 4, 2)  # tokens, batch, query heads and key heads of the block that both kernels compute
TOLERANCE = 2e-2

_FORWARD = torch.ops.aten._scaled_dot_product_cudnn_attention
_BACKWARD = torch.ops.aten._scaled_dot_product_cudnn_attention_backward

_lse_dimensions = 4  # of the log-sum-exp that this torch's forward returned last


def refusal(q: torch.Tensor) -> str | None:
    """Why cuDNN does not compute tensors like `q`, which flash supports; None if it does."""
    if torch.cuda.get_device_capability(q.device) < (9, 0):
        return "cuDNN's attention is faster only from Hopper on"
    if q.shape[-1] > WIDEST_HEAD:
        return f"cuDNN's attention supports heads of up to {WIDEST_HEAD} channels, these have {q.shape[-1]}"
    return _failure(q.device, q.dtype, q.shape[-1])


def forward(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: BlockMask, scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """See `BlockKernel.forward`."""
    global _lse_dimensions
    if not supports(q, k, v, mask):
        return flash_kernel.forward(q, k, v, mask, scale)
    out, lse, *_ = _FORWARD(*_heads_first(q, k, v), None, True, 0.0, mask == CAUSAL, False, scale=scale)
    _lse_dimensions = lse.dim()
    return out.permute(2, 0, 1, 3), lse.squeeze(-1) if lse.dim() == 4 else lse


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
    """See `BlockKernel.backward`."""
    if not supports(q, k, v, mask):
        return flash_kernel.backward(grad_out, q, k, v, out, lse, mask, scale)
    lse = lse.contiguous()
    seed, offset = (torch.empty((), dtype=torch.int64, device=q.device) for _ in range(2))  # unread without dropout
    grads = _BACKWARD(
        *_heads_first(grad_out.contiguous(), q, k, v, out.contiguous()),
        lse.unsqueeze(-1) if _lse_dimensions == 4 else lse,
        seed,
        offset,
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


def supports(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: BlockMask) -> bool:
    """Whether cuDNN computes this block; otherwise flash does."""
    if q.shape[0] % REGULAR or k.shape[0] % REGULAR or not is_countable(q, k, v):
        return False
    return mask == FULL or (mask == CAUSAL and q.shape[0] == k.shape[0])


def _heads_first(*tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """`[s, b, h, d]` viewed as torch's `[b, h, s, d]`."""
    return tuple(_viewed_heads_first(t if t.stride(-1) == 1 else t.contiguous()) for t in tensors)


def _viewed_heads_first(tensor: torch.Tensor) -> torch.Tensor:
    if tensor.shape[1] == 1:  # a batch of one may have any stride; give it the stride of a larger batch
        tensor = tensor.select(1, 0).unsqueeze(0).transpose(0, 1)
    return tensor.permute(1, 2, 0, 3)


@functools.cache
def _failure(device: torch.device, dtype: torch.dtype, head_dim: int) -> str | None:
    """Why cuDNN fails to match flash on a small block; None if they agree."""
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
        log.warning("not using cuDNN attention (%s); FlashAttention computes every block, which is slower", reason)
        return f"cuDNN's attention fails its check on this machine: {reason}"
    return None
