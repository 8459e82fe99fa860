"""Build this rank's part of a model and give it weights.

    architecture ──▶ LlamaModel (this stage's layers, this rank's slices) ──▶ weights from Hugging Face, from a
    checkpoint, or drawn at random ──▶ mixed-precision wrapper ──▶ Megatron-Core's data-parallel wrapper
"""

from __future__ import annotations

import torch
from megatron.core import parallel_state
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
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
    return [model.to(torch.cuda.current_device())]


def layer_offset(architecture: Architecture, layout_pipeline: int) -> int:
    """The global number of this stage's first layer."""
    return parallel_state.get_pipeline_model_parallel_rank() * (architecture.num_layers // layout_pipeline)


def wrap_for_training(chunks: list[torch.nn.Module], *, distributed_optimizer: bool = True) -> list[torch.nn.Module]:
    """Add bf16 inputs/outputs where the weights are bf16, and gradient buffers reduced over data × context ranks."""
    config = chunks[0].config
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
        chunk = chunk.module
    return chunk
