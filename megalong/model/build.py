"""Build this rank's part of a model and give it weights.

architecture ──▶ LlamaModel (this stage's layers, this rank's slices) ──▶ weights from Hugging Face, from a
checkpoint, or drawn at random ──▶ mixed-precision wrapper ──▶ Megatron-Core's data-parallel wrapper
"""

from __future__ import annotations

from typing import Any, cast

import torch
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
from megatron.core.tensor_parallel.layers import (
    ColumnParallelLinear,
    RowParallelLinear,
    VocabParallelEmbedding,
)
from megatron.core.transformer.module import Float16Module

from megalong.config.architecture import Architecture
from megalong.config.compute import Parallel
from megalong.model.config import ModelSettings, transformer_config
from megalong.model.llama import LlamaModel
from megalong.model.lora import freeze_base
from megalong.runtime.megatron import mark_as_slice


def build_model(architecture: Architecture, settings: ModelSettings | None = None) -> list[torch.nn.Module]:
    """This rank's model chunks (one per virtual stage), bare and with unset weights, on the current device."""
    settings = settings or ModelSettings()
    config = transformer_config(architecture, settings)
    virtual = settings.grid.virtual
    stages: list[int | None] = [None] if virtual == 1 else list(range(virtual))
    device = torch.device(torch.cuda.current_device())
    chunks = [LlamaModel(config, architecture, stage).to(device) for stage in stages]
    for chunk in chunks:
        mark_tensor_parallel(chunk)
        if settings.lora is not None:
            freeze_base(chunk)
    return list(chunks)


def mark_tensor_parallel(model: torch.nn.Module) -> None:
    """Mark which weights are slices, and along which dimension.

    Megatron-Core does this when it initializes weights, which we have switched off. Unmarked weights would count as
    copies: all but those of tensor rank 0 would be left out of the gradient norm, and clipping would be wrong.
    """
    cut = {ColumnParallelLinear: 0, RowParallelLinear: 1, VocabParallelEmbedding: 0}
    for module in model.modules():
        for kind, dim in cut.items():
            if isinstance(module, kind) and module.weight is not None:
                mark_as_slice(module.weight, dim)


def wrap_for_training(chunks: list[torch.nn.Module], parallel: Parallel) -> list[torch.nn.Module]:
    """Add bf16 inputs and outputs if the weights are bf16, and gradient buffers reduced over data × context ranks."""
    config: Any = chunks[0].config
    if config.bf16:
        chunks = [Float16Module(config, chunk) for chunk in chunks]
    ddp = DistributedDataParallelConfig(
        grad_reduce_in_fp32=True,
        use_distributed_optimizer=parallel.use_distributed_optimizer,
        overlap_grad_reduce=parallel.overlap_grad_reduce,
        overlap_param_gather=parallel.overlap_param_gather,
        check_for_nan_in_grad=False,
    )
    return [
        # Buckets are for overlap, and the gradients of later chunks are complete long before backward ends.
        DistributedDataParallel(config=config, ddp_config=ddp, module=chunk, disable_bucketing=index > 0)
        for index, chunk in enumerate(chunks)
    ]


def unwrap(chunk: torch.nn.Module) -> LlamaModel:
    """The LlamaModel inside its wrappers."""
    while not isinstance(chunk, LlamaModel):
        chunk = cast(torch.nn.Module, chunk.module)
    return chunk
