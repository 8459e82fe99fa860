"""The forward pass without training that held-out evaluation and `megalong evaluate perplexity` share."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from megalong.batches.micro_batch import MicroBatch
from megalong.evaluation.buckets import PositionLoss
from megalong.model.schedule import LossObserver, reduce_losses, run_microbatches


def adding_to(positions: PositionLoss) -> LossObserver:
    """An observer for `run_microbatches` that adds losses to `positions`, in training and evaluation."""

    def observe(losses: torch.Tensor, batch: MicroBatch) -> None:
        positions.add(losses, batch.positions, batch.loss_mask)

    return observe


def forward_losses(
    chunks: list[torch.nn.Module], micro_batches: Sequence[MicroBatch], positions: PositionLoss
) -> torch.Tensor:
    """Add the losses of one global batch to `positions`; every rank of the world calls it.

    Args:
        chunks: this rank's model, wrapped for training or not.
        micro_batches: this rank's share of the global batch, at least one.
        positions: collects losses on the ranks that have them; `positions.reduce(None)` sums over the world.

    Returns:
        float64 [4], the sums of `run_microbatches` over the global batch, on every rank.
    """
    for chunk in chunks:
        chunk.eval()
    with torch.no_grad():
        local = run_microbatches(chunks, micro_batches, forward_only=True, observe=adding_to(positions))
    return reduce_losses(local)
