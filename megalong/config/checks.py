"""Rules that span sections, the cluster or the model. Each error names the rule, the values and the fix.

`check_config` runs when the file is read, `check_world` when the number of processes is known, `check_model` when the
architecture is known. None needs torch, and all run before a process is spawned.
"""

import math

from megalong.config.architecture import Architecture
from megalong.config.attention_checks import check_attention, check_window
from megalong.config.sections import Sections
from megalong.errors import UserError


def check_config(config: Sections) -> None:
    """Check the rules that need only the configuration.

    `sequence_parallel` with one tensor-parallel rank is refused, not ignored: a run does what its file says.
    """
    _check_task(config)
    _check_sequence(config)
    _check_pipeline(config)
    check_attention(config)
    _check_faults(config)
    optimizer, training = config.optimizer, config.training
    if optimizer.warmup_iters >= training.train_iters:
        raise UserError(
            f"optimizer.warmup_iters {optimizer.warmup_iters} must be below training.train_iters "
            f"{training.train_iters}: shorten the warm-up or train longer"
        )
    if training.global_batch_size % training.micro_batch_size:
        raise UserError(
            f"training.global_batch_size {training.global_batch_size} is not a multiple of training.micro_batch_size "
            f"{training.micro_batch_size}: write a multiple of it"
        )
    if config.evaluation.interval and not config.data.split_weights[1]:
        raise UserError(
            f"evaluation.interval {config.evaluation.interval} needs held-out data, but data.split "
            f'"{config.data.split}" leaves nothing for validation; write data.split: "99,1", or evaluation.interval: 0'
        )


def _check_task(config: Sections) -> None:
    data, sft = config.data, config.sft
    if config.task == "pretrain":
        if not data.mixture:
            raise UserError("data.mixture: is missing; write at least one {name: …, path: …, weight: 1}")
        if sft.sources:
            raise UserError("sft.sources are not read by task pretrain: write task: sft, or leave sft out")
        return
    if not sft.sources:
        raise UserError("sft.sources: is missing; write at least one {name: …, path: chats.jsonl}")
    if data.pose is not None:
        raise UserError("data.pose is not read by task sft: leave it out, or write task: pretrain")
    if data.mixture:
        raise UserError("data.mixture is not read by task sft: leave it out, or write task: pretrain")
    if data.packing != "best_fit":
        raise UserError(
            f"data.packing {data.packing} with task sft: conversations must stay whole and masked from each other; "
            "write packing: best_fit"
        )
    if sft.max_length is not None and sft.max_length > data.seq_length:
        raise UserError(
            f"sft.max_length {sft.max_length} is above data.seq_length {data.seq_length}, which no conversation may "
            "exceed; write a longer seq_length or a smaller max_length"
        )


def _check_faults(config: Sections) -> None:
    runtime = config.runtime
    if runtime.watchdog_minutes is not None and runtime.watchdog_minutes >= runtime.timeout_minutes:
        raise UserError(
            f"runtime.watchdog_minutes {runtime.watchdog_minutes:g} is not below runtime.timeout_minutes "
            f"{runtime.timeout_minutes:g}: collectives would time out before the stacks are written; write a smaller "
            "value, or 0 for no watchdog"
        )
    if config.guard.replay and config.precision.fp8 is not None and config.precision.fp8_recipe == "delayed":
        raise UserError(
            "guard.replay true with precision.fp8_recipe delayed: its scales change with every pass, so a replay "
            "differs even on healthy hardware; write fp8_recipe: tensorwise, or replay: false"
        )


def _check_sequence(config: Sections) -> None:
    parallel = config.parallel
    if parallel.sequence_parallel and parallel.tensor_model_parallel_size == 1:
        raise UserError(
            "parallel.sequence_parallel needs parallel.tensor_model_parallel_size above 1 (it splits activations over "
            "the tensor-parallel ranks): write sequence_parallel: false, or a larger tensor_model_parallel_size"
        )


def _check_pipeline(config: Sections) -> None:
    parallel = config.parallel
    interleaved = parallel.virtual_pipeline_model_parallel_size > 1
    if interleaved and parallel.pipeline_model_parallel_size == 1:
        raise UserError(
            f"parallel.virtual_pipeline_model_parallel_size {parallel.virtual_pipeline_model_parallel_size} "
            "interleaves pipeline stages, but parallel.pipeline_model_parallel_size is 1: write 1, or a longer pipeline"
        )
    if interleaved and (parallel.batch_p2p_comm or parallel.overlap_p2p_comm is False):
        raise UserError(
            "parallel.batch_p2p_comm true (or overlap_p2p_comm false) with an interleaved pipeline is refused: with "
            "two stages the next and the previous rank are the same, batched sends pair wrongly and gradients "
            "are silently wrong; leave both out, or write overlap_p2p_comm: true, batch_p2p_comm: false"
        )
    if not interleaved and (parallel.overlap_p2p_comm or parallel.batch_p2p_comm is False):
        raise UserError(
            "parallel.overlap_p2p_comm true (or batch_p2p_comm false) needs an interleaved pipeline: write "
            "virtual_pipeline_model_parallel_size 2 or more, or leave both out"
        )
    if parallel.overlap_param_gather and not (parallel.use_distributed_optimizer and parallel.overlap_grad_reduce):
        raise UserError(
            "parallel.overlap_param_gather true needs use_distributed_optimizer: true and overlap_grad_reduce: true: "
            "it gathers what that optimizer has sharded, in the same buckets"
        )


def check_replicas(config: Sections, world_size: int) -> None:
    """Refuse a number of processes that is not a whole number of replicas (world = TP * CP * PP * DP)."""
    parallel, divisor = config.parallel, config.grid.model_parallel_size
    if world_size >= 1 and world_size % divisor == 0:
        return
    below, above = world_size // divisor * divisor, (max(world_size, 0) // divisor + 1) * divisor
    sizes = [
        (name, [size for size in range(1, own) if world_size >= 1 and world_size % (divisor // own * size) == 0])
        for name in ("tensor_model_parallel_size", "context_parallel_size", "pipeline_model_parallel_size")
        for own in (getattr(parallel, name),)
    ]
    fits = "; ".join(f"{name} {_listed(found)}" for name, found in sizes if found)
    raise UserError(
        f"{world_size} processes cannot hold whole replicas of tensor {parallel.tensor_model_parallel_size} * "
        f"context {parallel.context_parallel_size} * pipeline {parallel.pipeline_model_parallel_size} = {divisor} "
        f"ranks: start a multiple of {divisor} processes, such as {f'{below} or {above}' if below > 0 else above}"
        + (f", or lower one size under parallel ({fits})" if fits else ", or lower sizes under parallel")
    )


def _listed(sizes: list[int]) -> str:
    return ", ".join(map(str, sizes))


def check_world(config: Sections, world_size: int) -> None:
    """Refuse a configuration that does not divide `world_size` processes into replicas, or a batch among replicas."""
    check_replicas(config, world_size)
    replicas, training = config.grid.replicas(world_size), config.training
    step = training.micro_batch_size * replicas
    if training.global_batch_size % step:
        above = (training.global_batch_size // step + 1) * step
        raise UserError(
            f"training.global_batch_size {training.global_batch_size} is not a multiple of micro_batch_size "
            f"{training.micro_batch_size} * data parallel {replicas} = {step} (data parallel = {world_size} processes "
            f"/ {config.grid.model_parallel_size}): write {above}, or use fewer processes"
        )
    pipeline, micro_batches = config.parallel.pipeline_model_parallel_size, training.global_batch_size // step
    if config.parallel.virtual_pipeline_model_parallel_size > 1 and micro_batches % pipeline:
        raise UserError(
            f"training.global_batch_size {training.global_batch_size} gives every rank {micro_batches} micro-batches, "
            f"and an interleaved pipeline of {pipeline} stages needs a multiple of {pipeline}: write a multiple of "
            f"{step * pipeline}"
        )


def check_model(config: Sections, architecture: Architecture) -> None:
    """Refuse a split that does not divide the model (heads, KV groups, MLP, vocabulary, layers), and windows in FP8.

    `architecture` is the model as it is trained: its window comes from the configuration or from the loaded model.
    """
    if any(architecture.layer_windows):
        check_window(config, f"the model's window_size {architecture.window_size}")
    tensor = config.parallel.tensor_model_parallel_size
    pipeline = config.parallel.pipeline_model_parallel_size * config.parallel.virtual_pipeline_model_parallel_size
    tensor_key, pipeline_key = "parallel.tensor_model_parallel_size", "parallel.pipeline_model_parallel_size"
    if config.parallel.virtual_pipeline_model_parallel_size > 1:
        pipeline_key += " * virtual_pipeline_model_parallel_size"
    of_tensor = (
        ("attention heads", architecture.num_attention_heads),
        ("KV groups", architecture.num_query_groups),
        ("MLP channels (ffn_hidden_size)", architecture.ffn_hidden_size),
        ("vocabulary rows (padded to a multiple of 128)", architecture.padded_vocab_size),
    )
    whole = math.gcd(*(size for _, size in of_tensor))
    for what, size, divisor, key, cut in (
        *((what, size, tensor, tensor_key, whole) for what, size in of_tensor),
        ("layers", architecture.num_layers, pipeline, pipeline_key, architecture.num_layers),
    ):
        if size % divisor:
            fits = [n for n in range(1, cut + 1) if cut % n == 0]
            raise UserError(
                f"{key} {divisor} does not divide the model's {size} {what}: every rank needs an equal share; "
                f"sizes that fit: {_listed(fits)}{_processes(config, key, fits)}"
            )


def _processes(config: Sections, key: str, sizes: list[int]) -> str:
    """The processes that a replica needs for each of the `sizes` of a key; empty if the key is a product."""
    own = getattr(config.parallel, key.removeprefix("parallel."), None)
    if own is None:  # a product: the number of processes depends on its factors
        return ""
    others = config.grid.model_parallel_size // own
    return f" (on multiples of {_listed([size * others for size in sizes])} processes)"
