"""The layer specification: which module Megatron-Core uses in which place of a Llama layer."""

from __future__ import annotations

from megatron.core.fusions.fused_bias_dropout import get_bias_dropout_add
from megatron.core.transformer.attention import SelfAttention, SelfAttentionSubmodules
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.mlp import MLP, MLPSubmodules
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules
from megatron.core.transformer.transformer_layer import TransformerLayer, TransformerLayerSubmodules

from megalong.model.backend import Backend
from megalong.model.config import LlamaConfig
from megalong.model.lora import with_adapters


def llama_block(layers: int, config: LlamaConfig, backend: Backend) -> TransformerBlockSubmodules:
    """The `layers` equal layers of one pipeline stage, and the final norm."""
    return TransformerBlockSubmodules(layer_specs=[llama_layer(config, backend)] * layers, layer_norm=backend.norm)


def llama_layer(config: LlamaConfig, backend: Backend) -> ModuleSpec:
    """One pre-norm layer: attention and SwiGLU, each with a residual connection."""
    attention = ModuleSpec(
        module=SelfAttention,
        params={"attn_mask_type": AttnMaskType.causal},
        submodules=SelfAttentionSubmodules(
            linear_qkv=with_adapters(backend.column, "linear_qkv", config),
            core_attention=backend.attention,
            linear_proj=with_adapters(backend.row, "linear_proj", config),
        ),
    )
    mlp = ModuleSpec(
        module=MLP,
        submodules=MLPSubmodules(
            linear_fc1=with_adapters(backend.column, "linear_fc1", config),
            linear_fc2=with_adapters(backend.row, "linear_fc2", config),
            activation_func=backend.activation,
        ),
    )
    return ModuleSpec(
        module=TransformerLayer,
        submodules=TransformerLayerSubmodules(
            input_layernorm=backend.norm,
            self_attention=attention,
            self_attn_bda=get_bias_dropout_add,
            pre_mlp_layernorm=backend.norm,
            mlp=mlp,
            mlp_bda=get_bias_dropout_add,
        ),
    )
