"""Core attention: rotary positions, then causal attention over the context-parallel ranks.

RoPE is applied here and not by GPTModel, from the explicit positions of the micro-batch, so that the same code serves
extended, per-document and skipped positions on any token layout. YaRN's temperature multiplies both query and key, so
it is folded into the scale that every kernel accepts: softmax_scale · temperature².
"""

from __future__ import annotations

import math
from typing import Any

import torch
from megatron.core.transformer.enums import AttnMaskType

from megalong.attention.exchange import ContextGroups, context_attention
from megalong.attention.kernels import choose_kernel
from megalong.attention.plan import AttentionPlan
from megalong.model.attention_inputs import AttentionInputs
from megalong.model.config import LlamaConfig
from megalong.model.kv_cache import KVCache
from megalong.rope import apply_rotary, inverse_frequencies, temperature
from megalong.runtime.distributed import context_levels


class CoreAttention(torch.nn.Module):
    """Causal self-attention on this rank's heads and tokens.

    Megatron-Core's `SelfAttention` builds it. The ignored arguments are settings of Megatron-Core's own attention
    (masks, dropout, communication type).
    """

    def __init__(
        self,
        config: LlamaConfig,
        layer_number: int,
        attn_mask_type: AttnMaskType,
        attention_type: str,
        softmax_scale: float | None = None,
        pg_collection: Any = None,
        **unused: Any,
    ) -> None:
        super().__init__()
        head_dim = config.kv_channels
        assert head_dim is not None
        assert attn_mask_type == AttnMaskType.causal
        self.softmax_scale = (softmax_scale or 1 / math.sqrt(head_dim)) * temperature(config.rope) ** 2
        self.inverse_frequencies = inverse_frequencies(config.rope, head_dim).to(torch.cuda.current_device())
        self.groups = ContextGroups(*context_levels(), transport=config.transport)
        self.window = config.layer_windows[layer_number - 1]
        self.layer_number = layer_number

    def forward(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: torch.Tensor | None,
        *unused: Any,
        packed_seq_params: AttentionInputs | None = None,
        **also_unused: Any,
    ) -> torch.Tensor:
        """Apply RoPE to query and key, then compute attention.

        Shapes: query [s, b, heads/TP, d], key and value [s, b, groups/TP, d], result [s, b, heads/TP · d]; s is S/CP.
        """
        assert isinstance(packed_seq_params, AttentionInputs)
        cos, sin = packed_seq_params.rotary(self.inverse_frequencies)
        query, key = apply_rotary(query, cos, sin), apply_rotary(key, cos, sin)
        if packed_seq_params.cache is not None:
            out = self.attend_cached(query, key, value, packed_seq_params.cache)
            return out.reshape(*out.shape[:2], -1)
        assert packed_seq_params.plan is not None
        out = self.attend(query, key, value, packed_seq_params.plan)
        return out.reshape(*out.shape[:2], -1)

    def attend(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, plan: AttentionPlan) -> torch.Tensor:
        """Attention of rotated queries to rotated keys: `[s, b, heads/TP, d]`."""
        kernel = choose_kernel(query)
        return context_attention(query, key, value, plan, self.groups, kernel, self.softmax_scale, self.window)

    def attend_cached(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, cache: KVCache
    ) -> torch.Tensor:
        """Attention to these keys and all cached ones, without gradients."""
        keys, values, mask = cache.extend(self.layer_number, key, value, self.window)
        out, _ = choose_kernel(query).forward(query, keys, values, mask, self.softmax_scale)
        return out
