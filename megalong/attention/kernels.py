"""Exact attention of a block of queries to a block of keys, with the log-sum-exp that lets blocks be merged.

A softmax over many keys can be computed block by block: besides its result, a block returns for every query the
logarithm of the sum of its exponentials. These two numbers are enough to merge two blocks of one query (merge.py).
Backward is independent too: each block gets the *merged* result and log-sum-exp and computes its part of the gradient
from `exp(score - lse)`; the parts are summed.

    kernel   device   types              why
    cpu      CPU      all                torch's fused kernel: no S x S scores (cpu_kernel.py)
    cudnn    Hopper   bf16, fp16         whole and causal blocks, flash does the others; heads up to 128 channels
    flash    CUDA     bf16, fp16         FlashAttention-2 as built into torch; heads of 8, 16, ... 256 channels
    tiled    any      all                plain torch in tiles of queries: what flash does not support (fp32, odd heads)

All of them support fewer key than query heads (GQA) without copying keys, and never allocate scores of queries x keys.
On CUDA, flash sums its query gradients in any order unless `torch.use_deterministic_algorithms` is on.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch

from megalong.attention import cpu_kernel, cudnn_kernel, flash_kernel, tiled
from megalong.attention.limits import Gradients
from megalong.attention.varlen import FLASH_VARLEN, VarlenKernel


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
    varlen: VarlenKernel | None = None  # for many blocks at once; None if there is no such kernel


@dataclass(frozen=True)
class Choice:
    """A kernel, and why no faster one is used, as text for a log line or `megalong doctor`."""

    kernel: BlockKernel
    reason: str


def choose_kernel(q: torch.Tensor) -> BlockKernel:
    """The kernel for tensors like `q`."""
    return kernel_of(q).kernel


def kernel_of(q: torch.Tensor) -> Choice:
    """The kernel for tensors like `q` (its device, type and head dimension), with the reason.

    On a Hopper GPU, the first call for a type and a head dimension computes a small block with cuDNN and with flash.
    """
    if q.device.type == "cpu":
        return Choice(CPU, "there is no GPU")
    refusal = _flash_refusal(q)
    if refusal is not None:
        return Choice(TILED, f"in plain torch, slowly: {refusal}")
    refusal = cudnn_kernel.refusal(q)
    if refusal is not None:
        return Choice(FLASH, refusal)
    blocks = f"of a multiple of {cudnn_kernel.REGULAR} tokens"
    return Choice(CUDNN, f"checked against flash; it computes whole and causal blocks {blocks}, flash all others")


def _flash_refusal(q: torch.Tensor) -> str | None:
    head_dim = q.shape[-1]
    if q.device.type != "cuda":
        return f"no fused kernel is known for {q.device.type}"
    if q.dtype not in (torch.bfloat16, torch.float16):
        return f"fused kernels support bf16 and fp16, not {str(q.dtype).removeprefix('torch.')}"
    if head_dim % 8 or head_dim > 256:
        return f"fused kernels support heads of 8, 16, ... 256 channels, not {head_dim}"
    if torch.cuda.get_device_capability(q.device) < (8, 0):
        return "fused kernels need compute capability 8.0 or later"
    return None


CPU = BlockKernel("cpu", cpu_kernel.forward, cpu_kernel.backward)
FLASH = BlockKernel("flash", flash_kernel.forward, flash_kernel.backward, FLASH_VARLEN)
CUDNN = BlockKernel("cudnn", cudnn_kernel.forward, cudnn_kernel.backward, FLASH_VARLEN)
TILED = BlockKernel("tiled", tiled.forward, tiled.backward)
