"""Exact attention of a block of queries to a block of keys, with the log-sum-exp that lets blocks be merged.

A softmax over many keys can be taken block by block: besides its result a block hands back, for every query, the
logarithm of the sum of its exponentials. Two blocks of one query merge by weights that follow from these two numbers
alone (ring.py). Backward runs the other way: given the *merged* result and log-sum-exp, each block's share of the
gradient is computed from `exp(score - lse)` as if it stood alone, and shares add up.

    kernel   device   types              why
    cpu      CPU      all                torch's fused kernel: no S x S scores
    flash    CUDA     bf16, fp16         FlashAttention-2 as built into torch; heads of 8, 16, ... 256 channels
    tiled    any      all                plain torch in tiles of queries: what flash does not take (fp32, odd heads)

All of them take fewer key than query heads (GQA) without copying keys, and never allocate scores of queries x keys.
On CUDA the order in which flash adds up its query gradients is free, unless `torch.use_deterministic_algorithms` is on.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch

from megalong.attention import tiled
from megalong.errors import UserError

Gradients = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


@dataclass(frozen=True)
class BlockKernel:
    """One implementation. h query heads, g key heads, g divides h; n queries, m keys (n = m where causal).

    `forward(q, k, v, causal, scale) -> (out, lse)` with q `[n, b, h, d]`, k and v `[m, b, g, d]`, out like q, and
    lse float32 `[b, h, n]`.
    `backward(grad_out, q, k, v, out, lse, causal, scale) -> (grad_q, grad_k, grad_v)` with out and lse merged over all
    blocks; gradients have the shapes of q, k, v, and their type or float32.
    """

    name: str
    forward: Callable[..., tuple[torch.Tensor, torch.Tensor]]
    backward: Callable[..., Gradients]


def choose_kernel(q: torch.Tensor, backend: str = "auto") -> BlockKernel:
    """The kernel for tensors like `q` (its device, type and head dimension). `backend`: auto or torch."""
    if backend not in ("auto", "torch"):
        raise UserError(f"attention.backend: {backend!r} is not known; write auto or torch")
    if q.device.type == "cpu":
        return CPU
    if q.device.type == "cuda" and _flash_takes(q):
        return FLASH
    return TILED


def _flash_takes(q: torch.Tensor) -> bool:
    head_dim = q.shape[-1]
    return (
        q.dtype in (torch.bfloat16, torch.float16)
        and head_dim % 8 == 0
        and head_dim <= 256
        and torch.cuda.get_device_capability(q.device) >= (8, 0)
    )


def _heads_first(*tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """`[s, b, h, d]` seen as torch's `[b, h, s, d]`; the kernels read any strides but that of the last dimension."""
    return tuple((t if t.stride(-1) == 1 else t.contiguous()).permute(1, 2, 0, 3) for t in tensors)


def _sequence_first(*tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
    return tuple(t.permute(2, 0, 1, 3) for t in tensors)


def _cpu_forward(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, causal: bool, scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
        *_heads_first(q, k, v), 0.0, causal, scale=scale
    )
    return _sequence_first(out)[0], lse


def _cpu_backward(
    grad_out: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    causal: bool,
    scale: float,
) -> Gradients:
    """torch adds up a group's key gradients in the type of the keys: 2e-2 off in bf16 with 8 heads a group.

    So below float32 it gets one query head of each group at a time, and the sum is ours, in float32.
    """
    kernel = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
    grad_out, q, k, v, out = _heads_first(grad_out, q, k, v, out)
    group_size = 1 if q.dtype == torch.float32 else q.shape[1] // k.shape[1]
    grad_q = torch.empty_like(q)
    grad_k, grad_v = (torch.zeros_like(t, dtype=torch.float32) for t in (k, v))
    for first in range(group_size):
        one = slice(first, None, group_size)  # with a group size of 1: all heads at once
        grads = kernel(grad_out[:, one], q[:, one], k, v, out[:, one], lse[:, one], 0.0, causal, scale=scale)
        grad_q[:, one] = grads[0]
        grad_k += grads[1]
        grad_v += grads[2]
    dq, dk, dv = _sequence_first(grad_q, grad_k, grad_v)
    return dq, dk, dv


def _flash_forward(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, causal: bool, scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    out, lse, *_ = torch.ops.aten._scaled_dot_product_flash_attention(
        *_heads_first(q, k, v), 0.0, causal, False, scale=scale
    )
    return _sequence_first(out)[0], lse


def _flash_backward(
    grad_out: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    causal: bool,
    scale: float,
) -> Gradients:
    """The kernel reads the log-sum-exp by address, so a slice of it must be made contiguous first."""
    no_random_state = (
        torch.zeros(2, dtype=torch.uint64, device=q.device),
        torch.zeros((), dtype=torch.uint64, device=q.device),
    )
    grads = torch.ops.aten._scaled_dot_product_flash_attention_backward(
        *_heads_first(grad_out, q, k, v, out),
        lse.contiguous(),
        None,  # no ragged batch, so no bounds of its sequences
        None,
        q.shape[0],
        k.shape[0],
        0.0,
        causal,
        *no_random_state,
        scale=scale,
    )
    dq, dk, dv = _sequence_first(*grads)
    return dq, dk, dv


CPU = BlockKernel("cpu", _cpu_forward, _cpu_backward)
FLASH = BlockKernel("flash", _flash_forward, _flash_backward)
TILED = BlockKernel("tiled", tiled.forward, tiled.backward)
