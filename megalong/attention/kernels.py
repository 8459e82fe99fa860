"""Exact attention of a block of queries to a block of keys, with the log-sum-exp that lets blocks be merged.

A softmax over many keys can be taken block by block: besides its result a block hands back, for every query, the
logarithm of the sum of its exponentials. Two blocks of one query merge by weights that follow from these two numbers
alone (merge.py). Backward runs the other way: given the *merged* result and log-sum-exp, each block's share of the
gradient is computed from `exp(score - lse)` as if it stood alone, and shares add up.

    kernel   device   types              why
    cpu      CPU      all                torch's fused kernel: no S x S scores (cpu_kernel.py)
    cudnn    Hopper   bf16, fp16         whole and causal blocks, flash takes the others; heads up to 128 channels
    flash    CUDA     bf16, fp16         FlashAttention-2 as built into torch; heads of 8, 16, ... 256 channels
    tiled    any      all                plain torch in tiles of queries: what flash does not take (fp32, odd heads)

All of them take fewer key than query heads (GQA) without copying keys, and never allocate scores of queries x keys.
On CUDA the order in which flash adds up its query gradients is free, unless `torch.use_deterministic_algorithms` is on.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch

from megalong.attention import cpu_kernel, cudnn_kernel, flash_kernel, tiled
from megalong.attention.varlen import FLASH_VARLEN, VarlenKernel
from megalong.errors import UserError

Gradients = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


@dataclass(frozen=True)
class BlockKernel:
    """One implementation. h query heads, g key heads, g divides h; n queries, m keys.

    `forward(q, k, v, mask, scale) -> (out, lse)` with q `[n, b, h, d]`, k and v `[m, b, g, d]`, out like q, and
    lse float32 `[b, h, n]`.
    `backward(grad_out, q, k, v, out, lse, mask, scale) -> (grad_q, grad_k, grad_v)` with out and lse merged over all
    blocks; gradients have the shapes of q, k, v, and their type or float32.
    """

    name: str
    forward: Callable[..., tuple[torch.Tensor, torch.Tensor]]
    backward: Callable[..., Gradients]
    varlen: VarlenKernel | None = None  # for many blocks at once, where there is such a kernel


def choose_kernel(q: torch.Tensor, backend: str = "auto") -> BlockKernel:
    """The kernel for tensors like `q` (its device, type and head dimension). `backend`: auto or torch."""
    if backend not in ("auto", "torch"):
        raise UserError(f"attention.backend: {backend!r} is not known; write auto or torch")
    if q.device.type == "cpu":
        return CPU
    if q.device.type == "cuda" and _flash_takes(q):
        return CUDNN if cudnn_kernel.takes(q) else FLASH
    return TILED


def _flash_takes(q: torch.Tensor) -> bool:
    head_dim = q.shape[-1]
    return (
        q.dtype in (torch.bfloat16, torch.float16)
        and head_dim % 8 == 0
        and head_dim <= 256
        and torch.cuda.get_device_capability(q.device) >= (8, 0)
    )


CPU = BlockKernel("cpu", cpu_kernel.forward, cpu_kernel.backward)
FLASH = BlockKernel("flash", flash_kernel.forward, flash_kernel.backward, FLASH_VARLEN)
CUDNN = BlockKernel("cudnn", cudnn_kernel.forward, cudnn_kernel.backward, FLASH_VARLEN)
TILED = BlockKernel("tiled", tiled.forward, tiled.backward)
