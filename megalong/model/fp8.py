"""Linear layers with operands rounded to FP8, emulated: what TE's layers do on a GPU, for machines without one.

A linear layer is three matrix products. Their operands are rounded as in Transformer Engine (TE), by attention/fp8.py;
their results and sums are not:

    forward    Y = X W^T      X, W in e4m3
    backward   dX = dY W      dY in e5m2 under `hybrid`, X and W as rounded in forward
               dW = dY^T X

These are the products of linear_qkv, linear_proj, linear_fc1 and linear_fc2; embedding, norms and head are not rounded.
The recipe decides where a tensor's scale comes from:

    tensorwise   from the tensor itself, on each rank
    delayed      from its largest magnitude in the previous step, on any tensor, context or data parallel rank

Delayed scales start at 1. They change only after a step that was applied (`refresh_scales`). So the number of
micro-batches does not matter, and recomputation and replay round as the first pass did. TE changes them after each
micro-batch. A checkpoint stores them where Megatron-Core stores TE's (`_extra_state`).

Everything is computed in float32, more slowly than bf16 on the same CPU: this shows what FP8 does to the loss, not to
the speed.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear
from torch.autograd.function import once_differentiable

from megalong.attention.fp8 import FORMATS, Formats, largest_magnitude, scale_for, to_fp8
from megalong.model.config import LlamaConfig
from megalong.model.own_product import OwnProduct

INPUT, WEIGHT, GRADIENT = range(3)


class TensorwiseScaling:
    """A scale from the tensor that is being rounded; there is no state."""

    def __init__(self, formats: Formats) -> None:
        self.formats = formats

    def scale(self, operand: int, tensor: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """The factor for `tensor`, float32 scalar."""
        return scale_for(largest_magnitude(tensor), dtype)


class DelayedScaling:
    """Scales of a layer's input, weight and gradient, each from its largest magnitude in the previous step.

    Attributes:
        scales: of this step.
        amax: largest magnitudes in this step so far, on this rank.
        observed: whether what is rounded counts for the next step's scales.
    """

    def __init__(self, formats: Formats) -> None:
        self.formats = formats
        self.scales, self.amax = torch.ones(3), torch.zeros(3)
        self.observed = True

    def scale(self, operand: int, tensor: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """This step's factor for `operand`, float32 scalar; while `observed`, `tensor` counts for the next step's.

        Seeing a tensor again in recomputation changes nothing, because only the largest magnitude counts.
        """
        if self.observed:
            self.amax[operand] = torch.maximum(self.amax[operand], largest_magnitude(tensor))
        return self.scales[operand]

    def refresh(self) -> None:
        """Compute the next step's scales from `amax`; a magnitude of 0, or one not seen, leaves its scale unchanged."""
        # Never in place: backward may still need the old scales.
        types = (self.formats.forward, self.formats.forward, self.formats.backward)
        self.scales = torch.stack([scale_for(a, t, s) for a, t, s in zip(self.amax, types, self.scales, strict=True)])
        self.forget()

    def forget(self) -> None:
        """Discard what was observed in this step."""
        self.amax = torch.zeros(3)


Scaling = TensorwiseScaling | DelayedScaling


def refresh_scales(chunks: list[torch.nn.Module]) -> None:
    """Compute the next step's scales from what all ranks have seen in this step; collective."""
    found = list(_delayed(chunks))
    if not found:
        return
    amax = torch.stack([scaling.amax for scaling in found])
    dist.all_reduce(amax, dist.ReduceOp.MAX, parallel_state.get_amax_reduction_group(with_context_parallel=True))
    for scaling, seen in zip(found, amax, strict=True):
        scaling.amax = seen
        scaling.refresh()


def forget_step(chunks: list[torch.nn.Module]) -> None:
    """Keep the scales of before this step, which was dropped or rejected; call on all ranks."""
    for scaling in _delayed(chunks):
        scaling.forget()


def _delayed(chunks: list[torch.nn.Module]) -> Iterator[DelayedScaling]:
    for module in (module for chunk in chunks for module in chunk.modules()):
        if isinstance(module, _Rounded) and isinstance(module.scaling, DelayedScaling):
            yield module.scaling


class _Rounded(OwnProduct):
    """Shared by both parallel linear layers; a mix-in to put before Megatron-Core's class."""

    def __init__(self, *arguments: Any, config: LlamaConfig, **options: Any) -> None:
        super().__init__(*arguments, config=config, **options)
        assert config.emulated_fp8 is not None
        formats = FORMATS[config.emulated_fp8]
        self.scaling: Scaling = (
            DelayedScaling(formats) if config.fp8_recipe == "delayed" else TensorwiseScaling(formats)
        )

    def product(self, input: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        """See `fp8_linear`. Evaluation does not change the scales."""
        if isinstance(self.scaling, DelayedScaling):
            self.scaling.observed = self.training
        return fp8_linear(input, weight, self.scaling)

    def get_extra_state(self) -> dict[str, torch.Tensor] | None:
        """The scales, if the recipe has state."""
        return {"scales": self.scaling.scales} if isinstance(self.scaling, DelayedScaling) else None

    def set_extra_state(self, state: Any) -> None:
        """Restore the scales; a checkpoint written without emulated delayed scaling has none of ours."""
        if isinstance(self.scaling, DelayedScaling) and isinstance(state, dict):
            self.scaling.scales = state["scales"].clone()


class Fp8ColumnParallelLinear(_Rounded, ColumnParallelLinear):
    """Outputs are split over tensor-parallel ranks; under sequence parallelism the input is gathered first."""


class Fp8RowParallelLinear(_Rounded, RowParallelLinear):
    """Inputs are split over tensor-parallel ranks, which sum their results unrounded."""


def fp8_linear(input: torch.Tensor, weight: torch.Tensor, scaling: Scaling) -> torch.Tensor:
    """`input @ weight.T` with all operands rounded, forward and backward: `[..., k]`, `[n, k]` to `[..., n]`.

    Result and gradients are those of the rounded operands, as if rounding had a derivative of 1.
    """
    result: torch.Tensor = _Product.apply(input, weight, scaling)
    return result


class _Product(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, input: torch.Tensor, weight: torch.Tensor, scaling: Scaling) -> torch.Tensor:
        dtype = scaling.formats.forward
        input_scale, weight_scale = scaling.scale(INPUT, input, dtype), scaling.scale(WEIGHT, weight, dtype)
        input8, weight8 = to_fp8(input, input_scale, dtype), to_fp8(weight, weight_scale, dtype)
        ctx.save_for_backward(input8 if ctx.needs_input_grad[1] else None, weight8, input_scale, weight_scale)
        ctx.scaling, ctx.shape = scaling, input.shape
        ctx.input_type, ctx.weight_type = input.dtype, weight.dtype
        # Flat: torch may multiply [s, b, k] as s small matrices.
        flat = (input8.flatten(0, -2).float() @ weight8.float().t()).div_(input_scale * weight_scale)
        return flat.to(input.dtype).view(*input.shape[:-1], len(weight))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        input8, weight8, input_scale, weight_scale = ctx.saved_tensors
        dtype = ctx.scaling.formats.backward
        scale = ctx.scaling.scale(GRADIENT, grad, dtype)
        rounded = to_fp8(grad, scale, dtype).flatten(0, -2).float()
        grad_input = grad_weight = None
        if ctx.needs_input_grad[0]:
            grad_input = (rounded @ weight8.float()).div_(scale * weight_scale).to(ctx.input_type).view(ctx.shape)
        if ctx.needs_input_grad[1]:
            grad_weight = (rounded.t() @ input8.flatten(0, -2).float()).div_(scale * input_scale).to(ctx.weight_type)
        return grad_input, grad_weight, None


def engine_linears() -> tuple[type, type]:
    """Transformer Engine's column- and row-parallel layers, which ignore the emulation's scales in a checkpoint."""
    from megatron.core.extensions.transformer_engine import TEColumnParallelLinear, TERowParallelLinear

    class EngineColumnParallelLinear(TEColumnParallelLinear):
        def set_extra_state(self, state: Any) -> None:
            if not isinstance(state, dict):
                super().set_extra_state(state)

    class EngineRowParallelLinear(TERowParallelLinear):
        def set_extra_state(self, state: Any) -> None:
            if not isinstance(state, dict):
                super().set_extra_state(state)

    return EngineColumnParallelLinear, EngineRowParallelLinear
