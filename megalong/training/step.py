"""One training step: compute the gradients of a global batch, check them, clip them, update the weights.

    gradients   forward and backward of the micro-batches; gradients summed over ranks, divided by the global count
    report      all-gather loss, gradient norm and signal of every rank; here the host waits for the device
    apply       clip by the norm, AdamW, FP8 scales of the next step

The guard decides between `report` and `apply`. All ranks see the same numbers, so all of them apply or none does. A
rejected step leaves weights, optimizer and FP8 scales unchanged.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from megatron.core.distributed import finalize_model_grads

from megalong.batches.loader import Batches
from megalong.batches.micro_batch import MicroBatch
from megalong.config.guard import Guard as GuardSettings
from megalong.evaluation.buckets import PositionLoss
from megalong.evaluation.forward import adding_to
from megalong.model.fp8 import forget_step, refresh_scales
from megalong.model.schedule import reduce_losses, run_microbatches
from megalong.runtime import signals
from megalong.runtime.distributed import from_all_ranks, replica_of
from megalong.runtime.random_states import random_states, restore
from megalong.training.guard import Event, Guard, Report
from megalong.training.health import StepClock
from megalong.training.interrupt import Interrupt, StepDropped
from megalong.training.optimizer import clip_gradients
from megalong.training.replay import compare


@dataclass(frozen=True)
class StepResult:
    """What a step did, the same on every rank.

    Attributes:
        loss: mean over the valid tokens of the global batch, nats per token; with `sft.loss_average: conversations` the
            mean of their conversations' means.
        units: number of tokens, or of conversations, over which `loss` is averaged.
        tokens: tokens of the global batch that count in the loss.
        filled: input tokens of the global batch that are not padding.
        gradient_norm: before clipping.
        learning_rate: of this step.
        seconds: wall time of data, forward_backward and optimizer on this rank.
        document_lengths: of the documents that this replica read; of whole samples without document masks.
        event: the guard's finding on this step, or None.
        signalled: whether any rank received a signal to save and exit.
        own_seconds: this rank's time until the gradient reduction over replicas (health.py).
    """

    loss: float
    tokens: int
    gradient_norm: float
    learning_rate: float
    seconds: dict[str, float]
    document_lengths: tuple[int, ...] = ()
    units: int = 0
    filled: int = 0
    event: Event | None = None
    signalled: bool = False
    own_seconds: float = 0.0

    @property
    def applied(self) -> bool:
        """Whether the step was applied to the weights."""
        return self.event is None or self.event.applied


@dataclass(frozen=True)
class Gradients:
    """What `gradients` returns; the gradients themselves are in the model's buffers. Tensors are still on the device.

    Attributes:
        totals: float64 [4], the result of `run_microbatches` over the global batch.
        own_loss: float64 [], this rank's sum of losses.
        own_norm: float32 [], norm of this rank's gradients before they are summed over replicas.
        started: `time.perf_counter()` when computation began.
    """

    totals: torch.Tensor
    own_loss: torch.Tensor
    own_norm: torch.Tensor
    started: float


@dataclass(frozen=True)
class RankReports:
    """What `report` returns: tuples have one number for each rank; `units`, `tokens`, `filled` are global sums."""

    units: float
    tokens: float
    filled: float
    losses: tuple[float, ...]
    norms: tuple[float, ...]
    own_losses: tuple[float, ...]
    own_norms: tuple[float, ...]
    signals: tuple[float, ...]
    seconds: tuple[float, ...]

    @property
    def own(self) -> list[tuple[float, float]]:
        return list(zip(self.own_losses, self.own_norms, strict=True))

    def report(self, number: int) -> Report:
        return Report(number, self.losses, self.norms, self.own_losses, self.own_norms)


class TrainStep:
    """Runs steps on one model, optimizer and schedule."""

    def __init__(
        self,
        chunks: list[torch.nn.Module],
        optimizer: Any,
        scheduler: Any,
        guard: Guard | None = None,
        interrupt: Interrupt | None = None,
    ) -> None:
        """`guard` defaults to one with default settings. `interrupt` may drop a step after a signal."""
        self.chunks, self.optimizer, self.scheduler = chunks, optimizer, scheduler
        self.guard, self.interrupt = guard or Guard(GuardSettings()), interrupt
        self._own_norm = torch.zeros(())
        self.clock = StepClock()

    def run(
        self, batches: Batches, consumed_samples: int, positions: PositionLoss | None = None, number: int = 0
    ) -> StepResult:
        """Train on the global batch that starts at sample `consumed_samples`, unless the guard rejects it.

        Args:
            positions: accumulates losses by position of applied steps, on the last pipeline stage.
            number: of this step, from 1.

        Raises:
            StepDropped: a signal came and the step would take too long; weights, optimizer and random states are those
                before the step.
        """
        started = time.perf_counter()
        self.clock.start()
        if self.interrupt is not None:
            self.interrupt.step_begins(number)
        states = random_states()
        micro_batches = batches.at(consumed_samples)
        loaded = time.perf_counter()
        self.clock.compute()
        found = PositionLoss(positions.edges[-1]) if positions is not None else None
        try:
            reports = self.report(self.gradients(micro_batches, found, self.interrupt))
        except StepDropped:
            restore(states)
            forget_step(self.chunks)
            raise
        computed, own_seconds = time.perf_counter(), self.clock.seconds
        if self.interrupt is not None:
            self.interrupt.step_took(max(reports.seconds))
        learning_rate = self.optimizer.param_groups[0]["lr"]
        event = self.guard.judge(reports.report(number))
        if event is not None:
            samples = batches.places(consumed_samples, map(replica_of, event.ranks))
            event = replace(event, samples=samples, replay=self._replay(reports, micro_batches, states))
        if event is None or event.applied:
            self.apply(reports.norms[0])
            if positions is not None and found is not None:
                positions.merge(found)
        else:
            forget_step(self.chunks)
        self.scheduler.step(1)
        stepped = time.perf_counter()
        return StepResult(
            loss=reports.losses[0],
            tokens=round(reports.tokens),
            gradient_norm=reports.norms[0],
            learning_rate=learning_rate,
            seconds={
                "data": loaded - started,
                "forward_backward": computed - loaded,
                "optimizer": stepped - computed,
            },
            document_lengths=tuple(length for batch in micro_batches for length in batch.document_lengths),
            units=round(reports.units),
            filled=round(reports.filled),
            event=event,
            signalled=any(reports.signals),
            own_seconds=own_seconds,
        )

    def gradients(
        self,
        micro_batches: Sequence[MicroBatch],
        positions: PositionLoss | None = None,
        interrupt: Interrupt | None = None,
    ) -> Gradients:
        """Compute the gradients of the global batch and sum them over ranks; collective.

        Args:
            positions: collects losses by position on the last pipeline stage.
            interrupt: asked before each micro-batch whether to drop the step.

        Raises:
            StepDropped: on all ranks at the same micro-batch.
        """
        started = time.perf_counter()
        for chunk in self.chunks:
            chunk.train()
            chunk.zero_grad_buffer()  # type: ignore[operator]
        self.optimizer.zero_grad()
        with self._schedule_callbacks():
            own = run_microbatches(
                self.chunks,
                micro_batches,
                observe=adding_to(positions) if positions is not None else None,
                before_each=interrupt.reached if interrupt is not None else None,
            )
        return Gradients(reduce_losses(own), own[0], self._own_norm, started)

    def report(self, gradients: Gradients) -> RankReports:
        """Measure the gradients and gather what every rank found; collective."""
        loss_sum, units, tokens, filled = gradients.totals.tolist()
        self.optimizer.prepare_grads()
        norm = float(self.optimizer.get_grad_norm())
        own_loss, own_norm = float(gradients.own_loss), float(gradients.own_norm)
        signal, seconds = float(signals.received() is not None), time.perf_counter() - gradients.started
        mine = [loss_sum / max(units, 1.0), norm, own_loss, own_norm, signal, seconds]
        return RankReports(units, tokens, filled, *zip(*from_all_ranks(mine), strict=True))

    def apply(self, norm: float) -> None:
        """Clip the gradients, whose norm is `norm`, and update weights and FP8 scales; after `report`."""
        clip_gradients(self.optimizer, norm)
        self.optimizer.step_with_ready_grads()
        refresh_scales(self.chunks)

    @contextlib.contextmanager
    def _schedule_callbacks(self) -> Iterator[None]:
        """Set the functions that Megatron-Core's schedule calls when gradients are complete, during this block only.

        Every module refers to the configuration, so a function left there that refers to the model would close a cycle.
        It leads through autograd's nodes, which the garbage collector cannot see through, and the model would stay in
        memory for as long as the process lives.
        """
        config: Any = self.chunks[0].config
        no_sync = [chunk.no_sync for chunk in self.chunks]
        config.finalize_model_grads_func = self._finalize
        config.no_sync_func = no_sync if len(self.chunks) > 1 else no_sync[0]
        try:
            yield
        finally:
            config.finalize_model_grads_func = config.no_sync_func = None

    def _finalize(self, *arguments: Any, **options: Any) -> None:
        """Measure this rank's own gradient norm, then reduce gradients with Megatron-Core's `finalize_model_grads`.

        With `overlap_grad_reduce`, some gradients are already reduced at this point.
        """
        self.clock.stop()
        own = [torch.linalg.vector_norm(buffer.grad_data) for chunk in self.chunks for buffer in _buffers(chunk)]
        self._own_norm = torch.linalg.vector_norm(torch.stack(own).float())
        finalize_model_grads(*arguments, **options)

    def _replay(self, first: RankReports, micro_batches: list[MicroBatch], states: dict[str, Any]) -> str | None:
        """Compute the step a second time, if `guard.replay` asks for it."""
        if not self.guard.settings.replay:
            return None
        after = random_states()
        restore(states)
        again = self.report(self.gradients(micro_batches))
        restore(after)
        return compare(first.own, again.own)


def _buffers(chunk: Any) -> list[Any]:
    return [*chunk.buffers, *chunk.expert_parallel_buffers]
