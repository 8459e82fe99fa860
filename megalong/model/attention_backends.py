"""Core attention computed otherwise than by our own exact kernels: with FP8 operands, emulated.

What differs is the call after rotation; positions, plans and exchanges are those of `core_attention`.
"""

from __future__ import annotations

from typing import Any

import torch
from megatron.core import parallel_state

from megalong.attention.exchange import context_attention
from megalong.attention.fp8 import FORMATS, AttentionRounding, fp8_kernel
from megalong.attention.plan import AttentionPlan
from megalong.model.config import LlamaConfig
from megalong.model.core_attention import CoreAttention


class EmulatedFp8Attention(CoreAttention):
    """`precision.fp8_dot_product_attention` where there is no GPU."""

    def __init__(self, config: LlamaConfig, *arguments: Any, **options: Any) -> None:
        super().__init__(config, *arguments, **options)
        assert config.emulated_fp8 is not None
        formats = FORMATS[config.emulated_fp8]
        group = parallel_state.get_context_parallel_group() if config.context_parallel_size > 1 else None
        self.rounding = AttentionRounding(formats, results=config.fp8_recipe == "delayed", group=group)
        self.fp8_kernel = fp8_kernel(formats)

    def attend(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, plan: AttentionPlan) -> torch.Tensor:
        """Attention of rounded operands, exchanged as exact ones are."""

        def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
            return context_attention(q, k, v, plan, self.groups, self.fp8_kernel, self.softmax_scale, self.window)

        return self.rounding.around(attend, query, key, value)
