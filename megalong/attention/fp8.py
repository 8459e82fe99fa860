"""Emulated FP8: what 8-bit numbers do to a matrix product, without a GPU that supports them.

    format   sign exponent mantissa   largest   half a step, relative   smallest
    e4m3     1 + 4 + 3                    448   2^-4                    2^-9
    e5m2     1 + 5 + 2                  57344   2^-3                    2^-16

One factor scales a tensor to a format's range, its largest magnitude (amax) to the format's largest number:

    scale = largest / amax        x8 = round(x * scale)        x ~ x8 / scale

Every operand above the smallest normal number is then off by at most half a step. Smaller ones lose bits, and those
below half of `smallest` become 0. Products of two such numbers are exact in float32, where they are summed, so a
float32 product of rounded operands equals a GPU's FP8 product except for the order of its sums.

`hybrid` uses e4m3 in forward and e5m2, which has more range, for gradients; `e4m3` uses e4m3 for both.

Attention rounds what Transformer Engine's FP8 attention rounds. Q, K and V share one scale, dO has its own, both of the
whole tensors on all context-parallel ranks. They are applied before blocks are cut, so the token layout does not matter
to them.

    operand   type       scale
    Q, K, V   forward    their common amax
    P         forward    in O = P V each row's largest value in its block, because kernels round exp(score - maximum)
                         before they divide by the sum; in dV = P^T dO 1
    dO        backward   its amax
    dS        backward   the tile's amax up to a power of two, with which a number rounds the same in any tile

Under delayed scaling O is returned in the forward type, and dQ, dK, dV, with a common scale, in the backward type.
Transformer Engine's delayed scales are those of the previous pass, which no attention here remembers.
Source: FP8 formats for deep learning, arXiv 2209.05433; Transformer Engine's recipes, and its table of FusedAttention.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch.autograd.function import once_differentiable

from megalong.attention import tiled
from megalong.attention.kernels import BlockKernel


@dataclass(frozen=True)
class Formats:
    """`precision.fp8`: the type of operands in forward and of gradients in backward."""

    forward: torch.dtype
    backward: torch.dtype


FORMATS = {
    "hybrid": Formats(torch.float8_e4m3fn, torch.float8_e5m2),
    "e4m3": Formats(torch.float8_e4m3fn, torch.float8_e4m3fn),
}


def largest_magnitude(*tensors: torch.Tensor, group: dist.ProcessGroup | None = None) -> torch.Tensor:
    """The largest |x| of all tensors, over the ranks of `group` if there is one: float32 scalar."""
    amax = torch.stack([tensor.detach().abs().amax() for tensor in tensors]).amax().float()
    if group is not None:
        dist.all_reduce(amax, dist.ReduceOp.MAX, group)
    return amax


def scale_for(amax: torch.Tensor, dtype: torch.dtype, before: torch.Tensor | float = 1.0) -> torch.Tensor:
    """The factor that scales `amax` to the largest number of `dtype`; `before` if amax is 0 or not finite."""
    # Not `max / amax`, which torch computes as a reciprocal times a number, rounding twice.
    scale = (torch.full_like(amax, torch.finfo(dtype).max) / amax).clamp_(max=torch.finfo(torch.float32).max)
    usable = (amax > 0) & amax.isfinite()
    return torch.where(usable, scale, torch.as_tensor(before, dtype=scale.dtype, device=scale.device))


def to_fp8(tensor: torch.Tensor, scale: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """`tensor * scale` in `dtype`, rounded to the nearest, ties to even; larger values are clamped to the largest."""
    limit = torch.finfo(dtype).max
    return (tensor.float() * scale).clamp_(-limit, limit).to(dtype)


def rounded(tensor: torch.Tensor, dtype: torch.dtype, amax: torch.Tensor) -> torch.Tensor:
    """`tensor` rounded to `dtype`, scaled by `amax`; returned in its own type."""
    scale = scale_for(amax, dtype)
    return (to_fp8(tensor, scale, dtype).float() / scale).to(tensor.dtype)


def rounded_rows(weights: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Weights >= 0, rounded relative to the largest in their row (last dimension)."""
    limit = torch.finfo(dtype).max
    unit = weights.amax(-1, keepdim=True).clamp_(min=torch.finfo(weights.dtype).tiny) / limit
    return (weights / unit).clamp_(max=limit).to(dtype).to(weights.dtype) * unit


def rounded_probabilities(weights: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Weights between 0 and 1, rounded with the scale for an amax of 1."""
    return rounded(weights, dtype, weights.new_ones(()))


def rounded_in_any_tile(tensor: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """A tile, rounded alike in any tile except for numbers 2^28 (e5m2) or 2^13 (e4m3) times below its largest."""
    scale = scale_for(largest_magnitude(tensor), dtype)
    power = torch.ldexp(torch.ones_like(scale), torch.frexp(scale).exponent - 1)
    return to_fp8(tensor, power, dtype).to(tensor.dtype).div_(power)


def fp8_kernel(formats: Formats) -> BlockKernel:
    """A block kernel that rounds P and dS; its callers round the rest (`AttentionRounding`)."""
    return BlockKernel(
        "fp8",
        partial(tiled.forward, round_weights=partial(rounded_rows, dtype=formats.forward)),
        partial(
            tiled.backward,
            round_weights=partial(rounded_probabilities, dtype=formats.forward),
            round_scores=partial(rounded_in_any_tile, dtype=formats.backward),
        ),
    )


@dataclass(frozen=True)
class AttentionRounding:
    """The rounding of whole tensors before and after a blockwise attention.

    `results`: whether O, dQ, dK and dV are rounded too. `group`: the context-parallel ranks, None for one rank.
    """

    formats: Formats
    results: bool
    group: dist.ProcessGroup | None = None

    def around(
        self, attend: Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor], *operands: torch.Tensor
    ) -> torch.Tensor:
        """`attend(q, k, v)` with rounded q, k, v `[s, b, heads, d]`; its backward gets a rounded gradient.

        `attend` must compute with `fp8_kernel`. All ranks of the group must call this, and its backward, in the same
        order.
        """
        q, k, v = _Operands.apply(self, *operands)
        out: torch.Tensor = _Result.apply(self, attend(q, k, v))
        return out

    def together(self, tensors: tuple[torch.Tensor, ...], dtype: torch.dtype) -> tuple[torch.Tensor, ...]:
        """All tensors, rounded with one scale."""
        amax = largest_magnitude(*tensors, group=self.group)
        return tuple(rounded(tensor, dtype, amax) for tensor in tensors)


class _Operands(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rounding: AttentionRounding, *operands: torch.Tensor) -> tuple[torch.Tensor, ...]:
        ctx.rounding = rounding
        return rounding.together(operands, rounding.formats.forward)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        rounding = ctx.rounding
        return None, *(rounding.together(grads, rounding.formats.backward) if rounding.results else grads)


class _Result(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rounding: AttentionRounding, out: torch.Tensor) -> torch.Tensor:
        ctx.rounding = rounding
        return rounding.together((out,), rounding.formats.forward)[0] if rounding.results else out.view_as(out)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        return None, *ctx.rounding.together((grad,), ctx.rounding.formats.backward)
