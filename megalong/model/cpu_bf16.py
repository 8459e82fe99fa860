"""bf16 matrix products on a CPU without bf16 instructions.

On such a CPU (at most AVX2) a bf16 product takes ten times as long as a float32 one, because torch has only a plain
loop for it. Here the operands are widened and multiplied in float32, and the result is rounded once, as on a GPU's
tensor cores.

    2048 x 128 by 128 x 384, one core, AVX2:    float32 50 GFLOP/s    bf16 4    bf16 through float32 50

Attention and emulated FP8 compute in float32 anyway.
"""

from __future__ import annotations

import functools
import logging
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear
from torch.autograd.function import once_differentiable

from megalong.model.own_product import OwnProduct

log = logging.getLogger("megalong")


def widens(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether products of `dtype` on `device` are computed as float32."""
    if device.type != "cpu" or dtype is not torch.bfloat16 or torch.backends.cpu.get_cpu_capability() != "AVX2":
        return False
    _report()
    return True


@functools.cache
def _report() -> None:
    log.info("this CPU has no bf16 matrix products: computing them in float32 and rounding (model/cpu_bf16.py)")


def linear(input: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """`input @ weight.T` in the fastest way: `[..., k]`, `[n, k]` to `[..., n]`. Differentiable once."""
    if not widens(input.device, input.dtype):
        return F.linear(input, weight)
    result: torch.Tensor = _Widened.apply(input, weight)
    return result


class _Widened(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, input: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(input if ctx.needs_input_grad[1] else None, weight)
        ctx.shape, ctx.dtype = input.shape, input.dtype
        # Flat: torch may multiply [s, b, k] as s small matrices.
        flat = input.flatten(0, -2).float() @ weight.float().t()
        out = input.new_empty(*input.shape[:-1], len(weight))  # not a view: the head overwrites part of it
        out.flatten(0, -2).copy_(flat)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        input, weight = ctx.saved_tensors
        flat = grad.flatten(0, -2).float()
        grad_input = grad_weight = None
        if ctx.needs_input_grad[0]:
            grad_input = (flat @ weight.float()).to(ctx.dtype).view(ctx.shape)
        if ctx.needs_input_grad[1]:
            grad_weight = (flat.t() @ input.flatten(0, -2).float()).to(weight.dtype)
        return grad_input, grad_weight


class _WidenedProduct(OwnProduct):
    def product(self, input: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        """See `linear`."""
        return linear(input, weight)


class WidenedColumnParallelLinear(_WidenedProduct, ColumnParallelLinear):
    """Computes its product in float32."""


class WidenedRowParallelLinear(_WidenedProduct, RowParallelLinear):
    """Computes its product in float32."""
