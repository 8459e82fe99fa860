"""The optimizer (AdamW, sharded over data × context ranks) and the learning-rate schedule, from the configuration.

Weights of one dimension (the norms) are not decayed, as in Megatron. Gradients are fp32; bf16 weights have fp32
masters in the optimizer.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler

from megalong.config.schema import Config
from megalong.model.config import DTYPES


def build_optimizer(config: Config, chunks: list[torch.nn.Module]) -> Any:
    """Megatron-Core's optimizer over AdamW for data-parallel wrapped `chunks`."""
    settings = config.optimizer
    dtype = DTYPES[config.precision.params_dtype]
    optimizer_config = OptimizerConfig(
        optimizer="adam",
        lr=settings.lr,
        min_lr=settings.min_lr,
        weight_decay=settings.weight_decay,
        adam_beta1=settings.adam_beta1,
        adam_beta2=settings.adam_beta2,
        adam_eps=settings.adam_eps,
        clip_grad=settings.clip_grad,
        bf16=dtype is torch.bfloat16,
        params_dtype=dtype,
        use_distributed_optimizer=config.parallel.use_distributed_optimizer,
        overlap_param_gather=config.parallel.overlap_param_gather,
    )
    return get_megatron_optimizer(optimizer_config, chunks, use_gloo_process_groups=dist.get_backend() == "nccl")


def build_scheduler(config: Config, optimizer: Any) -> OptimizerParamScheduler:
    """Linear warm-up from 0 to `lr`, then constant or a cosine to `min_lr` at the last iteration.

    The schedule counts iterations done; iteration i (from 0) runs at the rate of i + 1, so that warm-up never spends
    a step at rate 0.
    """
    settings, training = config.optimizer, config.training
    scheduler = OptimizerParamScheduler(
        optimizer,
        init_lr=0.0,
        max_lr=settings.lr,
        min_lr=settings.min_lr,
        lr_warmup_steps=settings.warmup_iters,
        lr_decay_steps=training.train_iters,
        lr_decay_style=settings.lr_schedule,
        start_wd=settings.weight_decay,
        end_wd=settings.weight_decay,
        wd_incr_steps=training.train_iters,
        wd_incr_style="constant",
        # A resumed run may train longer or at another rate: the configuration's values win over the checkpoint's.
        use_checkpoint_opt_param_scheduler=False,
        override_opt_param_scheduler=True,
    )
    scheduler.step(1)
    return scheduler
