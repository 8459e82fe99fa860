"""The optimizer (AdamW, sharded over data × context ranks) and the learning-rate schedule, from the configuration.

Weights of one dimension (the norms) are not decayed, as in Megatron. Gradients are fp32; bf16 weights have fp32 masters
in the optimizer.

The schedule is a function of the step's number i, from 1, and of the configuration alone. With W = warmup_iters (1 if
it is 0), N = train_iters and M = N, or N + 1 where min_lr is 0:

    lr(i) = lr · i / W                                                            i <= W
    lr(i) = min_lr + (lr - min_lr) · (1 + cos(π · (i - W) / (M - W))) / 2         W < i <= N (cosine)

So step W is the first at `lr`, and step N runs at `min_lr`. No step runs at a rate of 0, which is reached after the
last step. For lr 2e-3, min_lr 1e-4, W 2, N 8, steps 5 to 8 run at 1.05e-3, 5.75e-4, 2.27e-4, 1e-4; with train_iters 1
the one step runs at `lr`. Megatron-LM's and torch's loops step their schedule after the optimizer, so there step i runs
at the rate that this one has at i - 1: their warm-up spends its first step at 0, and they reach `min_lr` after the last
step.

A resumed run uses the configuration's values and logs those that have changed since the checkpoint:

| key | changed at a resume |
| --- | --- |
| `optimizer.lr`, `min_lr`, `lr_schedule`, `warmup_iters`, `training.train_iters` | the next step i runs at lr(i) as above, as if the schedule had been this one from the start |
| `training.train_iters` at or below the checkpoint's step | the run is complete |
| `optimizer.adam_beta1`, `adam_beta2`, `adam_eps`, `weight_decay`, `clip_grad` | apply from the next step on; both moments and the update count, which corrects their bias, are the checkpoint's |
| `training.global_batch_size` | the schedule counts steps, the data continues at the next sample |
| `precision.params_dtype` | applies from the next step on, with the checkpoint's fp32 masters; refused with `use_distributed_optimizer: false` and with `checkpoint.optimizer: dp_reshardable` |
| `parallel.use_distributed_optimizer` | refused: the state has another format |
"""  # noqa: E501

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
from megatron.core.optimizer.clip_grads import clip_grad_by_total_norm_fp32
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
    """The schedule described above, ready for the first step; step it once after each training step."""
    settings, steps = config.optimizer, config.training.train_iters
    warmup = max(settings.warmup_iters, 1)
    scheduler = OptimizerParamScheduler(
        optimizer,
        init_lr=0.0,
        max_lr=settings.lr,
        min_lr=settings.min_lr,
        lr_warmup_steps=warmup,
        # A single step leaves nothing to decay, but Megatron-Core requires the decay to end after the warm-up.
        lr_decay_steps=max(steps + (settings.min_lr == 0), warmup + 1),
        lr_decay_style=settings.lr_schedule,
        start_wd=settings.weight_decay,
        end_wd=settings.weight_decay,
        wd_incr_steps=steps,
        wd_incr_style="constant",
        # The configuration's values win over the checkpoint's.
        use_checkpoint_opt_param_scheduler=False,
        override_opt_param_scheduler=True,
    )
    scheduler.step(1)
    return scheduler


def clip_gradients(optimizer: Any, norm: float) -> None:
    """Scale gradients down to `optimizer.clip_grad` if their global norm `norm` is above it.

    Megatron-Core's `step` does this between `prepare_grads` and `step_with_ready_grads`; here the norm is not computed
    again.
    """
    for part in getattr(optimizer, "chained_optimizers", [optimizer]):
        parameters = [] if getattr(part, "is_stub_optimizer", False) else part.get_parameters()
        if parameters and part.config.clip_grad > 0:
            clip_grad_by_total_norm_fp32(
                parameters, part.config.clip_grad, norm, part.config.use_precision_aware_optimizer_no_fp8_or_ds_fp8
            )


def recorded(config: Config) -> dict[str, Any]:
    """The settings that trained a checkpoint's step, by key, as the checkpoint records them for `changed`."""
    found = {f"optimizer.{key}": value for key, value in config.optimizer.model_dump(mode="json").items()}
    found["training.train_iters"] = config.training.train_iters
    found["training.global_batch_size"] = config.training.global_batch_size
    found["parallel.use_distributed_optimizer"] = config.parallel.use_distributed_optimizer
    found["precision.params_dtype"] = config.precision.params_dtype
    found["precision.fp8"] = config.precision.fp8
    if config.task == "sft":
        found["sft.loss_average"] = config.sft.loss_average
    return found


def changed(before: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """What differs: `optimizer.lr 0.001 → 0.002`; a key that only one of them has is no change."""
    return [f"{key} {before[key]} → {now[key]}" for key in now if key in before and before[key] != now[key]]
