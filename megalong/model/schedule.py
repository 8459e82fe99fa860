"""Run micro-batches through the pipeline. Training and evaluation both compute forward and backward here.

Megatron-Core's schedules (no pipelining, 1F1B) do the work. The loss function returns the *sum* over valid tokens and
their count. Megatron-Core sums both over micro-batches, data and context ranks and divides the gradient once, so it
does not depend on how a batch is split. With equally weighted conversations (`weights` of the batch), a token's loss is
divided by its conversation's number of targets, and each conversation counts as 1.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.pipeline_parallel import get_forward_backward_func

from megalong.batches.micro_batch import MicroBatch
from megalong.model.attention_inputs import AttentionInputs

LossObserver = Callable[[torch.Tensor, MicroBatch], None]
LossParts = tuple[torch.Tensor, torch.Tensor, dict[str, torch.Tensor]]


def run_microbatches(
    chunks: list[torch.nn.Module],
    batches: Sequence[MicroBatch],
    *,
    forward_only: bool = False,
    observe: LossObserver | None = None,
    before_each: Callable[[int, int], None] | None = None,
) -> torch.Tensor:
    """Forward (and backward) of `batches`.

    Args:
        batches: this rank's micro-batches, at least one and all of one shape; the ranks of a model replica iterate over
            their parts of the same ones.
        observe: called on the last stage with each micro-batch's losses [b, S/CP] float32, only on its first
            tensor-parallel rank, because all of them hold the same losses.
        before_each: called before each forward with the micro-batch's number, from 0, and their count; may raise.

    Returns:
        float64 [4] on this rank's device: the weighted loss summed over this rank's valid tokens in nats, the divisor,
        the number of valid tokens (equal to the divisor if every token weighs 1), and the number of input tokens that
        are not padding; zeros before the last stage.
    """
    iterators = [_announced(batches, before_each) for _ in chunks]
    results = get_forward_backward_func()(
        forward_step_func=partial(_forward_step, observe),
        # Each chunk of an interleaved pipeline iterates over the same micro-batches independently.
        data_iterator=iterators[0] if len(chunks) == 1 else iterators,
        model=chunks,
        num_microbatches=len(batches),
        seq_length=batches[0].seq_length,
        micro_batch_size=batches[0].tokens.shape[0],
        forward_only=forward_only,
    )
    total = torch.zeros(4, dtype=torch.float64, device=torch.cuda.current_device())
    for result in results:
        total[:3] += result["sums"]
    if results:
        total[3] = sum(batch.filled for batch in batches)
    return total


def reduce_losses(local: torch.Tensor) -> torch.Tensor:
    """Sum results of `run_microbatches` (or anything that is zero before the last stage) over the global batch.

    Data and context ranks hold different tokens and are summed; tensor ranks hold the same tokens and are not. Every
    rank gets the result.
    """
    total = local.clone()
    dist.all_reduce(total, group=parallel_state.get_data_parallel_group(with_context_parallel=True))
    if parallel_state.get_pipeline_model_parallel_world_size() > 1:
        dist.broadcast(
            total,
            src=parallel_state.get_pipeline_model_parallel_last_rank(),
            group=parallel_state.get_pipeline_model_parallel_group(),
        )
    return total


def _announced(batches: Sequence[MicroBatch], before_each: Callable[[int, int], None] | None) -> Iterator[MicroBatch]:
    for number, batch in enumerate(batches):
        if before_each is not None:
            before_each(number, len(batches))
        yield batch


def _forward_step(
    observe: LossObserver | None, batches: Iterator[MicroBatch], model: torch.nn.Module
) -> tuple[torch.Tensor, Callable[[torch.Tensor], LossParts]]:
    batch = next(batches)
    output = model(tokens=batch.tokens, labels=batch.labels, attention_inputs=AttentionInputs.of(batch))
    return output, partial(_sum_of_losses, batch, observe)


def _sum_of_losses(batch: MicroBatch, observe: LossObserver | None, losses: torch.Tensor) -> LossParts:
    losses = losses.float()
    if observe is not None and parallel_state.get_tensor_model_parallel_rank() == 0:
        observe(losses.detach(), batch)
    total, units = (losses * batch.loss_weights).sum(), batch.units.sum()
    report = torch.stack([total.detach().double(), units.double(), batch.loss_mask.sum().double()])
    return total, units.to(torch.int), {"sums": report}
