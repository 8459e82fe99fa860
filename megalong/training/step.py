"""One training step: gradients of a global batch, clipped, applied.

losses (sum, count) ──schedule──▶ gradients / global valid tokens ──▶ clip by the global norm ──▶ AdamW ──▶ next LR
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

import torch
from megatron.core.distributed import finalize_model_grads

from megalong.evaluation.buckets import PositionLoss
from megalong.evaluation.forward import adding_to
from megalong.model.batch import MicroBatch
from megalong.model.schedule import reduce_losses, run_microbatches
from megalong.training.batches import Batches


@dataclass(frozen=True)
class StepResult:
    """What a step did, the same on every rank.

    Attributes:
        loss: mean over the valid tokens of the global batch, nats per token.
        tokens: valid tokens of the global batch.
        gradient_norm: before clipping.
        learning_rate: the one applied.
        seconds: wall time of data, forward_backward and optimizer on this rank.
        document_lengths: of what this rank's replica read; whole samples where documents see each other.
    """

    loss: float
    tokens: int
    gradient_norm: float
    learning_rate: float
    seconds: dict[str, float]
    document_lengths: tuple[int, ...] = ()


class TrainStep:
    """Runs steps on one model, optimizer and schedule."""

    def __init__(self, chunks: list[torch.nn.Module], optimizer: Any, scheduler: Any) -> None:
        self.chunks, self.optimizer, self.scheduler = chunks, optimizer, scheduler
        # Megatron-Core's schedule calls these at the places where gradients are complete.
        config: Any = chunks[0].config
        config.finalize_model_grads_func = finalize_model_grads
        no_sync = [chunk.no_sync for chunk in chunks]
        config.no_sync_func = no_sync if len(chunks) > 1 else no_sync[0]

    def run(self, batches: Batches, consumed_samples: int, positions: PositionLoss | None = None) -> StepResult:
        """Train on the global batch that starts at sample `consumed_samples`.

        Args:
            positions: collects losses by position on the last pipeline stage.
        """
        for chunk in self.chunks:
            chunk.train()
            chunk.zero_grad_buffer()  # type: ignore[operator]
        self.optimizer.zero_grad()
        started = time.perf_counter()
        micro_batches = list(batches.at(consumed_samples))
        loaded = time.perf_counter()
        total = self._gradients(micro_batches, positions)
        loss_sum, tokens = reduce_losses(total).tolist()
        computed = time.perf_counter()
        learning_rate = self.optimizer.param_groups[0]["lr"]
        _, norm, _ = self.optimizer.step()
        self.scheduler.step(1)
        stepped = time.perf_counter()
        return StepResult(
            loss=loss_sum / max(tokens, 1.0),
            tokens=round(tokens),
            gradient_norm=float(norm),
            learning_rate=learning_rate,
            seconds={
                "data": loaded - started,
                "forward_backward": computed - loaded,
                "optimizer": stepped - computed,
            },
            document_lengths=tuple(length for batch in micro_batches for length in batch.document_lengths),
        )

    def _gradients(self, micro_batches: list[MicroBatch], positions: PositionLoss | None) -> torch.Tensor:
        observe = adding_to(positions) if positions is not None else None
        return run_microbatches(self.chunks, micro_batches, observe=observe)
