"""The layer specification: which module Megatron-Core puts at which place of a Llama layer."""

from __future__ import annotations

from megatron.core.fusions.fused_bias_dropout import get_bias_dropout_add
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer.attention import SelfAttention, SelfAttentionSubmodules
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.mlp import MLP, MLPSubmodules
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules
from megatron.core.transformer.transformer_layer import TransformerLayer, TransformerLayerSubmodules

from megalong.model.attention_backends import EmulatedFp8Attention, EngineCoreAttention
from megalong.model.config import LlamaConfig
from megalong.model.core_attention import CoreAttention
from megalong.model.fp8 import Fp8ColumnParallelLinear, Fp8RowParallelLinear, engine_linears
from megalong.model.lora import LoraColumnParallelLinear, LoraRowParallelLinear, module_rows
from megalong.model.norm import RMSNorm
from megalong.model.swiglu import SwiGLU


def llama_layer(config: LlamaConfig) -> ModuleSpec:
    """One pre-norm layer: attention and SwiGLU, each with a residual around it."""
    linears = _linears(config)
    attention = ModuleSpec(
        module=SelfAttention,
        params={"attn_mask_type": AttnMaskType.causal},
        submodules=SelfAttentionSubmodules(
            linear_qkv=linears["linear_qkv"],
            core_attention=_attention(config),
            linear_proj=linears["linear_proj"],
        ),
    )
    mlp = ModuleSpec(
        module=MLP,
        submodules=MLPSubmodules(
            linear_fc1=linears["linear_fc1"], linear_fc2=linears["linear_fc2"], activation_func=SwiGLU
        ),
    )
    return ModuleSpec(
        module=TransformerLayer,
        submodules=TransformerLayerSubmodules(
            input_layernorm=RMSNorm,
            self_attention=attention,
            self_attn_bda=get_bias_dropout_add,
            pre_mlp_layernorm=RMSNorm,
            mlp=mlp,
            mlp_bda=get_bias_dropout_add,
        ),
    )


def _linears(config: LlamaConfig) -> dict[str, type | ModuleSpec]:
    """The four linear layers, with adapters beside those that `lora` targets."""
    column, row = _plain_linears(config)
    found: dict[str, type | ModuleSpec] = {
        "linear_qkv": column, "linear_proj": row, "linear_fc1": column, "linear_fc2": row
    }  # fmt: skip
    targets = set(config.lora.target_modules) if config.lora is not None else set()
    for place in ("linear_qkv", "linear_fc1"):
        if targets & set(module_rows(place, config)[1]):
            found[place] = ModuleSpec(module=LoraColumnParallelLinear, params={"place": place})
    for place, target in (("linear_proj", "o_proj"), ("linear_fc2", "down_proj")):
        if target in targets:
            found[place] = ModuleSpec(module=LoraRowParallelLinear, params={"target": target})
    return found


def _plain_linears(config: LlamaConfig) -> tuple[type, type]:
    """Column- and row-parallel linear layers: Megatron-Core's own, or ones with FP8 operands."""
    if config.emulated_fp8 is not None:
        return Fp8ColumnParallelLinear, Fp8RowParallelLinear
    if config.fp8 is not None:
        return engine_linears()
    return ColumnParallelLinear, RowParallelLinear


def _attention(config: LlamaConfig) -> type[CoreAttention]:
    if config.emulated_fp8 is not None and config.fp8_dot_product_attention:
        return EmulatedFp8Attention
    return EngineCoreAttention if config.kernel == "transformer_engine" else CoreAttention


def llama_block(layers: int, config: LlamaConfig) -> TransformerBlockSubmodules:
    """`layers` equal layers and the final norm: what one pipeline stage is told to build."""
    return TransformerBlockSubmodules(layer_specs=[llama_layer(config)] * layers, layer_norm=RMSNorm)
