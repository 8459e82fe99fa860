"""Build this rank's part of a model and give it weights.

architecture ──▶ LlamaModel (this stage's layers, this rank's slices) ──▶ weights from Hugging Face, from a
checkpoint, or drawn at random ──▶ mixed-precision wrapper ──▶ Megatron-Core's data-parallel wrapper
"""

from __future__ import annotations

from typing import Any, cast

import torch
from megatron.core import parallel_state
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
from megatron.core.tensor_parallel.layers import (
    ColumnParallelLinear,
    RowParallelLinear,
    VocabParallelEmbedding,
    set_tensor_model_parallel_attributes,
)
from megatron.core.transformer.module import Float16Module

from megalong.config.architecture import Architecture
from megalong.model.config import ModelSettings, transformer_config
from megalong.model.llama import LlamaModel


def build_model(architecture: Architecture, settings: ModelSettings | None = None) -> list[torch.nn.Module]:
    """This rank's model chunks (one per virtual stage), bare and with unset weights, on the current device."""
    settings = settings or ModelSettings()
    config = transformer_config(architecture, settings)
    model = LlamaModel(
        config,
        architecture,
        layers=architecture.num_layers // settings.layout.pipeline,
        pre_process=parallel_state.is_pipeline_first_stage(),
        post_process=parallel_state.is_pipeline_last_stage(),
    )
    model = model.to(torch.cuda.current_device())
    _mark_tensor_parallel(model)
    return [model]


def _mark_tensor_parallel(model: torch.nn.Module) -> None:
    """Say which weights are slices and along which dimension.

    Megatron-Core marks them when it initialises them, which we have switched off. Unmarked, they would count as
    copies: all but tensor rank 0's would be left out of the gradient norm, and clipping would be wrong.
    """
    cut = {ColumnParallelLinear: 0, RowParallelLinear: 1, VocabParallelEmbedding: 0}
    for module in model.modules():
        weight, dim = getattr(module, "weight", None), cut.get(type(module))
        if weight is not None and dim is not None:
            set_tensor_model_parallel_attributes(weight, is_parallel=True, dim=dim, stride=1)


def layer_offset(architecture: Architecture, layout_pipeline: int) -> int:
    """The global number of this stage's first layer."""
    return parallel_state.get_pipeline_model_parallel_rank() * (architecture.num_layers // layout_pipeline)


def wrap_for_training(chunks: list[torch.nn.Module], *, distributed_optimizer: bool = True) -> list[torch.nn.Module]:
    """Add bf16 inputs/outputs where the weights are bf16, and gradient buffers reduced over data × context ranks."""
    config: Any = chunks[0].config
    if config.bf16:
        chunks = [Float16Module(config, chunk) for chunk in chunks]
    ddp = DistributedDataParallelConfig(
        grad_reduce_in_fp32=True,
        use_distributed_optimizer=distributed_optimizer,
        overlap_grad_reduce=False,
        check_for_nan_in_grad=False,
    )
    return [DistributedDataParallel(config=config, ddp_config=ddp, module=chunk) for chunk in chunks]


def unwrap(chunk: torch.nn.Module) -> LlamaModel:
    """The LlamaModel inside its wrappers."""
    while not isinstance(chunk, LlamaModel):
        chunk = cast(torch.nn.Module, chunk.module)
    return chunk
