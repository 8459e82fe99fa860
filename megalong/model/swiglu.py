"""SwiGLU with its own backward: one pass over memory in each direction, and only its input is saved.

    y = silu(gate) · up        with [gate, up] the two halves of the first linear's output

In torch's operations this is a chunk, an activation and a product. Autograd's backward adds two products, an activation
gradient and a concatenation that copies both halves once more: five arrays of the layer's widest size, two of them
saved for backward. Here a tile of rows goes through all of it while it is in the cache, and both gradients are written
directly into their halves. On a GPU Megatron-Core's compiled kernel does the same. It needs Triton and a C compiler on
every node; if the first attempt fails, the GPU uses the tiles too.
Source: GLU variants, arXiv 2002.05202.
"""

from __future__ import annotations

import functools
import logging
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.fusions.fused_bias_swiglu import bias_swiglu_impl
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig
from torch.autograd.function import once_differentiable

log = logging.getLogger("megalong")

# Elements in one half of a tile: on a CPU, tile and temporaries fit a core's cache; a GPU wants few launches.
TILE_ELEMENTS = {"cpu": 1 << 17, "cuda": 1 << 26}
TOLERANCE = 2e-2


class SwiGLU(MegatronModule):
    """The activation that Megatron-Core's MLP builds: `[..., 2f]` to `[..., f]`, in the input's type."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__(config=config)

    def forward(self, gate_up: torch.Tensor) -> torch.Tensor:
        """silu(first half) · second half of the last dimension."""
        return swiglu(gate_up)


class CompiledSwiGLU(SwiGLU):
    """Megatron-Core's compiled kernel; usable if `why_not_compiled` is None."""

    def forward(self, gate_up: torch.Tensor) -> torch.Tensor:
        """silu(first half) · second half of the last dimension."""
        result: torch.Tensor = bias_swiglu_impl(gate_up, None)
        return result


@functools.cache
def why_not_compiled(device: torch.device) -> str | None:
    """Why Megatron-Core's compiled SwiGLU is not used on `device`; None if it works and is correct.

    It is tried once, forward and backward, on a small input: missing tools show only when it compiles.
    """
    generator = torch.Generator(device).manual_seed(0)
    gate_up, grad = (torch.randn(16, size, device=device, generator=generator).bfloat16() for size in (64, 32))
    try:
        with torch.enable_grad():
            ours, theirs = (
                _value_and_gradient(f, gate_up, grad) for f in (swiglu, lambda x: bias_swiglu_impl(x, None))
            )
        torch.testing.assert_close(theirs, ours, rtol=TOLERANCE, atol=TOLERANCE)
    except Exception as error:  # the compiler's errors have no common class
        why = str(error).strip().splitlines()[0][:200] if str(error).strip() else type(error).__name__
        log.warning("using the plain torch SwiGLU, which is slower: the compiled one fails on this node (%s)", why)
        return why
    return None


def _value_and_gradient(function: Any, gate_up: torch.Tensor, grad: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    leaf = gate_up.detach().requires_grad_()
    result = function(leaf)
    return result.detach(), torch.autograd.grad(result, leaf, grad)[0]


def swiglu(gate_up: torch.Tensor) -> torch.Tensor:
    """silu(first half) · second half: `[..., 2f]` to `[..., f]`. Differentiable once."""
    result: torch.Tensor = _SwiGLU.apply(gate_up)
    return result


class _SwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate_up: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(gate_up)
        rows = gate_up.flatten(0, -2)
        result = rows.new_empty(rows.shape[0], rows.shape[1] // 2)
        for tile, out in _tiles(rows, result):
            gate, up = tile.chunk(2, dim=-1)
            torch.mul(F.silu(gate), up, out=out)
        return result.view(*gate_up.shape[:-1], -1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> torch.Tensor:
        (gate_up,) = ctx.saved_tensors
        rows, grads = gate_up.flatten(0, -2), grad.flatten(0, -2)
        result = torch.empty_like(rows)
        for tile, upstream, out in _tiles(rows, grads, result):
            gate, up = tile.chunk(2, dim=-1)
            grad_gate, grad_up = out.chunk(2, dim=-1)
            torch.ops.aten.silu_backward.grad_input(upstream * up, gate, grad_input=grad_gate)
            torch.mul(upstream, F.silu(gate), out=grad_up)
        return result.view_as(gate_up)


def _tiles(rows: torch.Tensor, *others: torch.Tensor) -> zip[tuple[torch.Tensor, ...]]:
    count = max(1, 2 * TILE_ELEMENTS[rows.device.type] // rows.shape[-1])
    return zip(*(t.split(count) for t in (rows, *others)), strict=True)
