"""Exact angles for given positions, and the rotation of queries and keys by them.

Angles are `float64(inv_freq) * position`. In float32 this product alone would be off by up to 0.125 radians at 4M
tokens, in float64 by 1e-9. Only cosine and sine are stored as float32, and only for this rank's positions: `[s, d/2]`
each, not a table up to the longest position. (Reducing angles first and computing float32 sines was tried: at most
twice as fast, 0.5 ms less per 1K positions of 128 channels, once per batch. Not worth a second formula.)

Pair i is (x[i], x[i + d/2]), a vector in the plane:

    y[i]       = x[i] cos - x[i + d/2] sin
    y[i + d/2] = x[i + d/2] cos + x[i] sin

The gradient is the rotation by the opposite angle, so backward needs only cosine and sine, not x.
"""

from typing import Any

import torch
from torch.autograd.function import once_differentiable

CPU_TILE_ELEMENTS = 1 << 18  # twice as fast as whole tensors in fp32, three times in bf16
TILE_ELEMENTS = 1 << 24


def cos_sin(inv_freq: torch.Tensor, positions: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Cosine and sine, float32 `[..., d/2]`, of `inv_freq` (float32 `[d/2]`) times `positions` (int64 `[...]`).

    Within 1e-7 of the float64 truth for positions up to 2^31. The result lies on the device of `positions`.
    """
    angles = positions.double().unsqueeze(-1) * inv_freq.to(positions.device).double()
    return angles.cos().float(), angles.sin().float()


def apply_rotary(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotate `x` `[s, b, h, d]` (fp32, bf16 or fp16) by the angles of `cos`, `sin` (float32).

    They are `[s, d/2]` or `[s, 1, d/2]` if all rows have the same positions, else `[s, b, d/2]`. Computed in float32
    and rounded once to `x`'s type. Differentiable in `x`, not in the angles.
    """
    rotated: torch.Tensor = _Rotation.apply(x, cos, sin)
    return rotated


class _Rotation(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(cos, sin)
        return _rotate(x, cos, sin)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        cos, sin = ctx.saved_tensors
        return _rotate(grad, cos, -sin), None, None


def _rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """A tile of tokens at a time, so that the float32 temporaries stay small (on a CPU: within its cache)."""
    result = torch.empty_like(x, memory_format=torch.contiguous_format)
    elements = CPU_TILE_ELEMENTS if x.device.type == "cpu" else TILE_ELEMENTS
    tokens = max(1, elements // max(1, x[:1].numel()))
    cos, sin = (t.unsqueeze(1).unsqueeze(2) if t.dim() == 2 else t.unsqueeze(2) for t in (cos, sin))
    for tile in zip(*(t.split(tokens) for t in (x, result, cos, sin)), strict=True):
        _rotate_tile(*tile)
    return result


def _rotate_tile(x: torch.Tensor, result: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> None:
    first, second = x.chunk(2, dim=-1)
    half = x.shape[-1] // 2
    result[..., :half] = (first * cos).sub_(second * sin)
    result[..., half:] = (second * cos).add_(first * sin)
