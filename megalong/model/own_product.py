"""Megatron-Core's parallel linear layers with our own matrix product: for FP8 operands, or a CPU without bf16.

    column-parallel   gather tokens (sequence parallelism) → product
    row-parallel                                             product → sum over ranks, or reduce-scatter

Megatron-Core does the part after the product; the part before it is written here with autograd operations. So the
gathered input is saved for backward, while Megatron-Core's own product gathers it again: this takes more memory, on
CPUs only.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from megatron.core.tensor_parallel import (
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
)


class OwnProduct(torch.nn.Module):
    """A mix-in to put before a Megatron-Core layer, whose weight may be frozen; subclasses implement `product`."""

    def product(self, input: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        """`input @ weight.T`: `[..., k]`, `[n, k]` to `[..., n]` in the input's type."""
        raise NotImplementedError

    def _forward_impl(
        self,
        input: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        *,
        tp_group: dist.ProcessGroup | None,
        **options: Any,
    ) -> torch.Tensor:
        if options["sequence_parallel"]:
            input = gather_from_sequence_parallel_region(input, group=tp_group)
        elif options["allreduce_dgrad"]:
            input = copy_to_tensor_model_parallel_region(input, group=tp_group)
        product = self.product(input, weight)
        return product if bias is None else product + bias
