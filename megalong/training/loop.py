"""The training loop: step, evaluate, save, log, until `training.train_iters`.

Python's garbage collector is switched off and run by all ranks at the same step: a rank that stops to collect on its
own keeps every other waiting in the next collective.
"""

from __future__ import annotations

import gc
import logging
import time
from pathlib import Path

import torch.distributed as dist

from megalong.data.sampler import PackedSamples
from megalong.evaluation.buckets import PositionLoss
from megalong.evaluation.forward import forward_losses
from megalong.runtime.distributed import is_main_rank
from megalong.training import setup
from megalong.training.batches import Batches
from megalong.training.metrics import Metrics, StepRecord
from megalong.training.setup import Session
from megalong.training.step import StepResult, TrainStep

log = logging.getLogger("megalong")


class Trainer:
    """Runs a session to its last iteration."""

    def __init__(self, session: Session, metrics: Metrics) -> None:
        config = session.config
        self.session, self.config, self.metrics = session, config, metrics
        self.step = TrainStep(session.chunks, session.optimizer, session.scheduler)
        self.train = self._batches("train")
        self.validation = self._batches("validation") if config.evaluation.interval else None
        self._window = _Window(config.data.seq_length)

    def run(self) -> None:
        """Train until `training.train_iters`; the last step is always saved."""
        training = self.config.training
        self._say_what_is_read()
        gc.collect()
        gc.disable()
        try:
            while self.session.step < training.train_iters:
                self._one_step()
                if self.session.step % training.gc_interval == 0:
                    gc.collect()
        finally:
            gc.enable()

    def _one_step(self) -> None:
        session, config = self.session, self.config
        positions = self._window.positions if config.logging.position_buckets else None
        result = self.step.run(self.train, session.consumed_samples, positions)
        session.step += 1
        session.consumed_samples += config.training.global_batch_size
        self._window.add(result)
        last = session.step == config.training.train_iters
        validation = self._evaluate(last)
        self._save(last)
        if last or session.step % config.logging.log_interval == 0 or validation is not None:
            self._log(result, validation)

    def _evaluate(self, last: bool) -> PositionLoss | None:
        settings, started = self.config.evaluation, time.perf_counter()
        if self.validation is None or not (last or self.session.step % settings.interval == 0):
            return None
        positions = PositionLoss(self.config.data.seq_length)
        for index in range(settings.iters):
            batch = list(self.validation.at(index * self.config.training.global_batch_size))
            forward_losses(self.session.chunks, batch, positions)
        positions.reduce(None, self.session.device)
        self._window.seconds["evaluation"] = time.perf_counter() - started
        return positions

    def _save(self, last: bool) -> None:
        if not last and self.session.step % self.config.checkpoint.save_interval:
            return
        started = time.perf_counter()
        self.metrics.flush()
        path = setup.save(self.session)
        self._window.seconds["checkpoint"] = time.perf_counter() - started
        log.info("saved %s in %.1f s", path, self._window.seconds["checkpoint"])

    def _log(self, result: StepResult, validation: PositionLoss | None) -> None:
        window, config = self._window, self.config
        position_losses: list[float | None] = []
        if config.logging.position_buckets:
            window.positions.reduce(None, self.session.device)
            position_losses = window.positions.means()
        record = StepRecord(
            step=self.session.step,
            loss=window.loss,
            learning_rate=result.learning_rate,
            tokens=window.tokens,
            consumed_tokens=self.session.consumed_samples * config.data.seq_length,
            seconds=dict(window.seconds),
            gradient_norm=result.gradient_norm,
            validation_loss=_mean(validation) if validation is not None else None,
            position_losses=position_losses,
            validation_position_losses=validation.means() if validation is not None else [],
            document_lengths=window.document_lengths,
        )
        self.metrics.log_step(record)
        self._window = _Window(config.data.seq_length)

    def _batches(self, part: str) -> Batches:
        session = self.session
        return Batches(session.config, self._samples(part), session.device, session.architecture.widest_window)

    def _samples(self, part: str) -> PackedSamples:
        data = self.config.data
        samples = PackedSamples(
            data.mixture,
            data.seq_length,
            self.config.run.seed,
            data.split,
            part,
            separator=data.separator,
            index_folder=Path(self.config.run.dir) / "index",
            packing=data.packing,
        )
        if is_main_rank():  # the others read what this one has shuffled
            samples.prepare(*self._sample_range(part))
        dist.barrier()
        return samples

    def _sample_range(self, part: str) -> tuple[int, int]:
        training = self.config.training
        if part == "validation":
            return 0, self.config.evaluation.iters * training.global_batch_size
        return self.session.consumed_samples, training.train_iters * training.global_batch_size

    def _say_what_is_read(self) -> None:
        if not is_main_rank():
            return
        training = self.config.training
        for share in self.train.samples.describe(training.train_iters * training.global_batch_size):
            log.info("data: %s", share)


class _Window:
    """What has happened since the last logged step."""

    def __init__(self, seq_length: int) -> None:
        self.positions = PositionLoss(seq_length)
        self.seconds: dict[str, float] = {}
        self.tokens = 0
        self.document_lengths: list[int] = []
        self._loss_sum = 0.0

    def add(self, result: StepResult) -> None:
        self.tokens += result.tokens
        self.document_lengths += result.document_lengths
        self._loss_sum += result.loss * result.tokens
        for name, value in result.seconds.items():
            self.seconds[name] = self.seconds.get(name, 0.0) + value

    @property
    def loss(self) -> float:
        return self._loss_sum / max(self.tokens, 1)


def _mean(positions: PositionLoss) -> float:
    sums, counts = positions.sums_counts()
    return sum(sums) / max(sum(counts), 1)


def make_metrics(session: Session, world_size: int) -> Metrics:
    """The run's console line and curves; rank 0 writes."""
    return Metrics(
        session.config,
        Path(session.config.run.dir),
        session.step,
        is_main_rank(),
        architecture=session.architecture,
        world_size=world_size,
        device=session.device,
    )
