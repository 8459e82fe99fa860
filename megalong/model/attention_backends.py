"""Core attention without our exact kernels: with emulated FP8 operands, or by Transformer Engine.

Only the call after rotation differs; positions and plans are those of `core_attention`.
"""

from __future__ import annotations

from typing import Any

import torch
from megatron.core import parallel_state

from megalong.attention.exchange import context_attention
from megalong.attention.fp8 import FORMATS, AttentionRounding, fp8_kernel
from megalong.attention.plan import AttentionPlan
from megalong.attention.transformer_engine import EngineAttention
from megalong.model.config import LlamaConfig
from megalong.model.core_attention import CoreAttention


class EmulatedFp8Attention(CoreAttention):
    """`precision.fp8_dot_product_attention` without a GPU."""

    def __init__(self, config: LlamaConfig, *arguments: Any, **options: Any) -> None:
        super().__init__(config, *arguments, **options)
        assert config.emulated_fp8 is not None
        formats = FORMATS[config.emulated_fp8]
        group = parallel_state.get_context_parallel_group() if config.context_parallel_size > 1 else None
        self.rounding = AttentionRounding(formats, results=config.fp8_recipe == "delayed", group=group)
        self.fp8_kernel = fp8_kernel(formats)

    def attend(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, plan: AttentionPlan) -> torch.Tensor:
        """Attention with rounded operands, exchanged like exact ones."""

        def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
            return context_attention(q, k, v, plan, self.groups, self.fp8_kernel, self.softmax_scale, self.window)

        return self.rounding.around(attend, query, key, value)


class EngineCoreAttention(CoreAttention):
    """`attention.backend: transformer_engine`."""

    def __init__(self, config: LlamaConfig, layer_number: int, *arguments: Any, **options: Any) -> None:
        super().__init__(config, layer_number, *arguments, **options)
        assert config.num_query_groups is not None
        assert config.kv_channels is not None
        tensor = config.tensor_model_parallel_size
        self.engine = EngineAttention(
            config.num_attention_heads // tensor,
            config.num_query_groups // tensor,
            config.kv_channels,
            self.softmax_scale,
            self.window,
            layer_number,
            self.groups,
            parallel_state.get_context_parallel_group() if config.context_parallel_size > 1 else None,
        )

    def attend(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, plan: AttentionPlan) -> torch.Tensor:
        """Attention by Transformer Engine, which does its own exchange."""
        result: torch.Tensor = self.engine(query, key, value, plan)
        return result

    def sharded_state_dict(self, *unused: Any, **also_unused: Any) -> dict[str, Any]:
        """Nothing: its FP8 scales start anew at a resume, as in Megatron-Core, and no other backend has them."""
        return {}
