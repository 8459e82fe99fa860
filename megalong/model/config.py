"""From an `Architecture` and a run's settings to Megatron-Core's `TransformerConfig`.

Megatron-Core's settings default to GPT-2. This module sets those that make a Llama, and switches off the fusions that
need apex or a GPU.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
import torch.nn.functional as F
from megatron.core.transformer.transformer_config import TransformerConfig

from megalong.config.architecture import Architecture
from megalong.config.attention_checks import TORCH
from megalong.config.lora import Lora
from megalong.config.rope import RopeSettings
from megalong.runtime.grid import Grid

log = logging.getLogger("megalong")

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


@dataclass
class LlamaConfig(TransformerConfig):
    """`TransformerConfig` with the additional settings of our own modules.

    `emulated_fp8` replaces `fp8` without a GPU, because with `fp8` set Megatron-Core requires Transformer Engine.
    `fp8_recipe` and `fp8_dot_product_attention` mean the same in both cases.
    """

    rope: RopeSettings = field(default_factory=RopeSettings)
    attention: str = TORCH
    transport: Literal["ring", "all_gather"] = "ring"
    layer_windows: tuple[int | None, ...] = ()
    emulated_fp8: str | None = None
    lora: Lora | None = None


@dataclass(frozen=True)
class ModelSettings:
    """How a model is distributed and computed: everything but its architecture.

    `recompute` is `memory.recompute`, `attention` is `Resolved.backend`, `transport` is how keys travel between the
    groups of `grid.heads` ranks (`config.exchange`). `fp8` and the settings that begin with it come from `precision`.
    With `lora` (whose rank is then set) the model has adapters, and only these are trained.
    """

    grid: Grid = field(default_factory=Grid)
    sequence_parallel: bool = False
    params_dtype: torch.dtype = torch.float32
    recompute: str = "none"
    attention: str = TORCH
    transport: Literal["ring", "all_gather"] = "ring"
    fp8: str | None = None
    fp8_recipe: str = "delayed"
    fp8_dot_product_attention: bool = False
    lora: Lora | None = None


def transformer_config(architecture: Architecture, settings: ModelSettings) -> LlamaConfig:
    """Megatron-Core's configuration of a Llama (RMSNorm, SwiGLU, grouped queries, no biases, no dropout).

    Megatron-Core does not initialize the weights; they are always loaded or drawn afterwards.
    """
    grid = settings.grid
    return LlamaConfig(
        num_layers=architecture.num_layers,
        hidden_size=architecture.hidden_size,
        ffn_hidden_size=architecture.ffn_hidden_size,
        num_attention_heads=architecture.num_attention_heads,
        num_query_groups=architecture.num_query_groups,
        kv_channels=architecture.kv_channels,
        rope=architecture.rope,
        attention=settings.attention,
        transport=settings.transport,
        layer_windows=architecture.layer_windows,
        lora=settings.lora,
        normalization="RMSNorm",
        layernorm_epsilon=architecture.norm_epsilon,
        gated_linear_unit=True,
        activation_func=F.silu,
        use_te_activation_func=True,  # makes the MLP build the activation of its spec, our SwiGLU
        add_bias_linear=False,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        tensor_model_parallel_size=grid.tensor,
        pipeline_model_parallel_size=grid.pipeline,
        virtual_pipeline_model_parallel_size=grid.virtual if grid.virtual > 1 else None,
        overlap_p2p_comm=grid.virtual > 1,
        batch_p2p_comm=grid.virtual == 1,
        context_parallel_size=grid.context,
        sequence_parallel=settings.sequence_parallel,
        params_dtype=settings.params_dtype,
        pipeline_dtype=settings.params_dtype,
        bf16=settings.params_dtype is torch.bfloat16,
        # The gradient is a sum over tokens, divided once by the number of valid tokens in the global batch.
        calculate_per_token_loss=True,
        perform_initialization=False,
        # Megatron-Core's fused kernels for these need apex or compile for a GPU.
        gradient_accumulation_fusion=False,
        masked_softmax_fusion=False,
        bias_activation_fusion=False,
        bias_dropout_fusion=False,
        persist_layer_norm=False,
        **_recompute(settings.recompute),
        **_fp8(settings),
    )


def _recompute(mode: str) -> dict[str, Any]:
    """`full` keeps only each layer's input, `selective` everything but the attention kernel's inputs and outputs."""
    if mode == "full":
        return {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}
    if mode == "selective":
        return {"recompute_granularity": "selective", "recompute_modules": ["core_attn"]}
    return {}


def _fp8(settings: ModelSettings) -> dict[str, Any]:
    if settings.fp8 is None:
        return {}
    on_cpu = torch.device(torch.cuda.current_device()).type == "cpu"
    if on_cpu:
        log.info("no GPU in use: emulating FP8, which is slower than bf16: %s", _describe_rounding(settings))
    return {
        "emulated_fp8" if on_cpu else "fp8": settings.fp8,
        "fp8_recipe": settings.fp8_recipe,
        "fp8_dot_product_attention": settings.fp8_dot_product_attention,
    }


def _describe_rounding(settings: ModelSettings) -> str:
    forward, backward = ("e4m3", "e5m2") if settings.fp8 == "hybrid" else ("e4m3", "e4m3")
    rounded, kept = f"inputs and weights of qkv, proj, fc1 and fc2 to {forward}", "attention, norms, embedding, head"
    gradients = f"the gradients that reach them to {backward}"
    if settings.fp8_dot_product_attention:
        rounded += f", Q, K, V and P to {forward}"
        gradients += f", dO and dS to {backward}"
        kept = "norms, embedding, head"
    return f"it rounds {rounded}, {gradients}, by {settings.fp8_recipe} scaling; not {kept}, nor any sum"
