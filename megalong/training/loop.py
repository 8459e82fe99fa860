"""The training loop: step, evaluate, save, log, until `training.train_iters`, a signal, or a rollback.

Python's garbage collector is disabled, and all ranks collect at the same step: a rank that collected alone would keep
the others waiting in the next collective.
"""

from __future__ import annotations

import gc
import logging
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal

import torch.distributed as dist

from megalong.batches.loader import Batches
from megalong.batches.open_samples import Samples, check_tokenizer, open_samples
from megalong.batches.skipped_samples import remaining
from megalong.checkpoint.folder import step_folder
from megalong.checkpoint.saver import Saved
from megalong.costs.flops import mean_flops_per_token
from megalong.data.samples.sample import SampleSource
from megalong.errors import UserError
from megalong.evaluation.buckets import PositionLoss
from megalong.evaluation.forward import forward_losses
from megalong.runtime import peers, signals
from megalong.runtime.distributed import is_main_rank
from megalong.runtime.requeue import mark
from megalong.runtime.watchdog import Watchdog
from megalong.training import events, setup
from megalong.training.guard import Event
from megalong.training.hardware import device_peak, peak_memory
from megalong.training.health import HealthWatch
from megalong.training.interrupt import Interrupt, StepDropped, grace_of
from megalong.training.metrics.record import StepRecord
from megalong.training.metrics.recorder import Recorder, open_recorder
from megalong.training.metrics.sinks import Sink
from megalong.training.setup import Session
from megalong.training.step import StepResult, TrainStep

log = logging.getLogger("megalong")

Outcome = Literal["finished", "interrupted", "rolled back"]
# Guard action -> kind of the event in events.jsonl.
_KINDS = {"skip": "skip", "rollback": "rollback", "stop": "stop", "log": "spike"}
GUARDED = frozenset(_KINDS.values())


class Trainer:
    """Runs a session to its last iteration.

    Attributes:
        token_counts: since the last start or rollback: computed, trained and padding tokens.
    """

    def __init__(self, session: Session, recorder: Sink) -> None:
        config = session.config
        self.session, self.config, self.recorder = session, config, recorder
        self.interrupt = Interrupt(grace_of(config), may_drop=config.parallel.pipeline_model_parallel_size == 1)
        self.step = TrainStep(session.chunks, session.optimizer, session.scheduler, session.guard, self.interrupt)
        self.watchdog = Watchdog(Path(config.run.dir), dist.get_rank(), config.runtime.hang_minutes, self._record_hang)
        self.health = HealthWatch(Path(config.run.dir), session.step)
        self.train = self._batches("train")
        self.validation = self._batches("validation") if config.evaluation.interval else None
        self._window = _Window(config.data.positions)
        self._loader_logged = False
        self.token_counts: Counter[str] = Counter()

    def run(self) -> Outcome:
        """Train until `training.train_iters`; the last step is always saved.

        Raises:
            UserError: the guard stops the run.
        """
        training = self.config.training
        self._log_data()
        gc.collect()
        gc.disable()
        try:
            with self.watchdog:
                while self.session.step < training.train_iters:
                    outcome = self._one_step()
                    self.watchdog.beat()
                    if outcome is not None:
                        self._report_save(self.session.saver.finish())
                        return outcome
                    self._report_save(self.session.saver.poll())
                    if self.session.step % training.gc_interval == 0:
                        gc.collect()
                self._report_save(self.session.saver.finish())
        except UserError as error:
            if error.speaker == "world":  # raised by all ranks: the pending save is good
                self._report_save(self.session.saver.finish())
            raise
        finally:
            gc.enable()
            self.health.end()
            for batches in (self.train, self.validation):
                if batches is not None:
                    batches.close()
        return "finished"

    def _one_step(self) -> Outcome | None:
        """Run one step, then evaluate, save and log. Returns an outcome if the run ends early at this step."""
        session, config = self.session, self.config
        positions = self._window.positions if config.logging.position_buckets else None
        try:
            result = self.step.run(self.train, session.consumed_samples, positions, session.step + 1)
        except StepDropped:
            return self._stop_early(dropped=True)
        if result.event is not None and self._handle_event(result.event):
            return "rolled back"
        session.step += 1
        session.consumed_samples += config.training.global_batch_size
        self._log_loader()
        computed = config.training.global_batch_size * config.data.seq_length
        self._window.add(result, computed)
        self.token_counts.update(tokens=computed, learnt_tokens=result.tokens * result.applied)
        self.token_counts.update(padding_tokens=computed - result.filled)
        last = session.step == config.training.train_iters
        validation = None if result.signalled else self._evaluate(last)
        leave = not last and (result.signalled or self.interrupt.agreed)
        if not leave:
            self._save(last)
        logged = last or leave or session.step % config.logging.log_interval == 0 or validation is not None
        if logged and self._window.tokens:
            self._log(result, validation)
        return self._stop_early() if leave else None

    def _handle_event(self, event: Event) -> bool:
        """Record a guard event; return whether the run rolls back to its last checkpoint.

        Raises:
            UserError: the guard's action is `stop`.
        """
        if is_main_rank():
            log.warning("guard: %s: %s", event.action, event)
        details = {name: value for name, value in vars(event).items() if name not in ("step", "action")}
        events.record(self.config.run.dir, self.session.step, _KINDS[event.action], at=event.step, **details)
        self.recorder.event(event.step, _KINDS[event.action], event.what)
        if event.action == "stop":
            raise UserError(
                f"guard: {event}: this step is not saved, and earlier checkpoints are good; run the same command to "
                "resume from the newest, and if it happens again lower optimizer.lr or check the data"
            )
        if event.action == "rollback":
            guard, size = self.session.guard, self.config.training.global_batch_size
            first = self.session.consumed_samples
            guard.skipped_samples.add_places(
                [guard.skipped_samples.place(number) for number in range(first, first + size)]
            )
        return event.action == "rollback"

    def _stop_early(self, dropped: bool = False) -> Outcome:
        """Save the last complete step if it is not saved yet, and write `RUN/REQUEUE`."""
        session, run = self.session, Path(self.config.run.dir)
        self._report_save(session.saver.finish())
        if session.step and not step_folder(run, session.step).is_dir():
            self._save(last=True)
            self._report_save(session.saver.finish())
        if is_main_rank():
            signal = signals.received()
            name = signal.name if signal is not None else "another rank's"
            mark(run, session.step, name)
            events.record(run, session.step, "signal", signal=name, dropped=dropped)
            log.info(
                "signal %s: step %d %s; run the same command to resume from step %d",
                name,
                session.step + dropped,
                "is dropped because it would take too long" if dropped else "is finished and saved",
                session.step,
            )
        return "interrupted"

    def _record_hang(self) -> None:
        lost = peers.report_if_lost()
        details = {} if lost is None else {"lost": lost}
        events.record(self.config.run.dir, self.session.step, "hang", **details)

    def _evaluate(self, last: bool) -> _Validation | None:
        settings, started = self.config.evaluation, time.perf_counter()
        if self.validation is None or not (last or self.session.step % settings.interval == 0):
            return None
        self.interrupt.begins("the validation")
        positions, total, units = PositionLoss(self.config.data.seq_length), 0.0, 0.0
        for index in range(settings.iters):
            if self.interrupt.any_rank():
                return None
            batch = self.validation.at(index * self.config.training.global_batch_size)
            loss, count, *_ = forward_losses(self.session.chunks, batch, positions).tolist()
            total, units = total + loss, units + count
            self.watchdog.beat()
        positions.reduce(None, self.session.device)
        self._window.seconds["evaluation"] = time.perf_counter() - started
        return _Validation(total / max(units, 1), positions)

    def _save(self, last: bool) -> None:
        if not last and self.session.step % self.config.checkpoint.save_interval:
            return
        started = time.perf_counter()
        self.interrupt.begins("a save")
        self.recorder.flush()
        self._report_save(setup.save(self.session))
        self._window.seconds["checkpoint"] = time.perf_counter() - started

    def _report_save(self, saved: Saved | None) -> None:
        """Log how a save ended, if one did.

        Raises:
            UserError: the last step's save failed; `on_save_failure` is ignored, because no later save follows.
        """
        if saved is None:
            return
        if saved.failure is not None:
            events.record(self.config.run.dir, saved.step, "save_failed", reason=saved.failure)
            if saved.step == self.config.training.train_iters:
                raise UserError(saved.failure)
            return
        self.interrupt.save_took(saved.seconds)
        log.info("saved %s in %.1f s; training paused for %.2f s", saved.path, saved.seconds, saved.pause)
        events.record(self.config.run.dir, saved.step, "save", seconds=saved.seconds, pause=saved.pause)

    def _log(self, result: StepResult, validation: _Validation | None) -> None:
        window, session = self._window, self.session
        if self.config.logging.position_buckets:
            window.positions.reduce(None, session.device)
        self.recorder.step(self._record(result, validation))
        write = "checkpoint" in window.seconds or session.step == self.config.training.train_iters
        health = self.health.report(
            session.step, window.steps, window.seconds, window.own, window.useful, window.skipped, write
        )
        if health is not None:  # on rank 0
            self.recorder.health(session.step, health)
        self._window = _Window(self.config.data.positions)

    def _record(self, result: StepResult, validation: _Validation | None) -> StepRecord:
        window, session, data = self._window, self.session, self.config.data
        return StepRecord(
            step=session.step,
            steps=window.steps,
            loss=window.loss,
            learning_rate=result.learning_rate,
            tokens=window.computed,
            trained_tokens=window.tokens,
            padding_tokens=window.computed - window.filled,
            consumed_tokens=session.consumed_samples * data.seq_length,
            seconds=dict(window.seconds),
            gradient_norm=result.gradient_norm,
            validation_loss=validation.loss if validation is not None else None,
            position_losses=window.positions.by_bucket() if self.config.logging.position_buckets else {},
            validation_position_losses=validation.positions.by_bucket() if validation is not None else {},
            world_size=dist.get_world_size(),
            flops_per_token=mean_flops_per_token(session.architecture, window.document_lengths or [data.seq_length]),
            peak_memory=peak_memory(session.device),
        )

    def _batches(self, part: str) -> Batches:
        session = self.session
        samples: Callable[[], SampleSource] = self._samples(part)
        if part == "train" and session.guard.skipped_samples.count:
            samples = partial(remaining, samples, session.guard.skipped_samples)
        return Batches(
            session.config,
            samples,
            session.device,
            session.architecture.widest_window,
            period=session.config.evaluation.iters if part == "validation" else None,
        )

    def _samples(self, part: str) -> Callable[[], Samples]:
        vocabulary, index = self.session.architecture.vocab_size, Path(self.config.run.dir) / "index"
        opened = partial(open_samples, self.config, part, self.session.assets, index, vocabulary)
        if is_main_rank():  # the other ranks read what this one has tokenized or shuffled
            samples = opened()
            if part == "train":
                for line in check_tokenizer(self.config, samples, self.session.assets):
                    log.warning("%s", line)
            samples.prepare(*self._sample_range(part))
        dist.barrier()
        return opened

    def _sample_range(self, part: str) -> tuple[int, int]:
        training = self.config.training
        if part == "validation":
            return 0, self.config.evaluation.iters * training.global_batch_size
        last = training.train_iters * training.global_batch_size
        return self.session.consumed_samples, last + self.session.guard.skipped_samples.count

    def _log_data(self) -> None:
        if not is_main_rank():
            return
        training = self.config.training
        for share in self.train.samples.describe(training.train_iters * training.global_batch_size):
            log.info("data: %s", share)

    def _log_loader(self) -> None:
        """Log once how this rank reads its data, after the first step."""
        if not self._loader_logged and is_main_rank():
            log.info("data: %s", self.train.describe())
        self._loader_logged = True


@dataclass(frozen=True)
class _Validation:
    """Held-out loss: the mean, averaged like the training loss, and the losses by position."""

    loss: float
    positions: PositionLoss


class _Window:
    """Sums since the last logged step."""

    def __init__(self, seq_length: int) -> None:
        self.positions = PositionLoss(seq_length)
        self.seconds: dict[str, float] = {}
        self.tokens = self.computed = self.filled = self.steps = self.skipped = 0
        self.own = self.useful = 0.0
        self.document_lengths: list[int] = []
        self._loss_sum, self._units = 0.0, 0

    def add(self, result: StepResult, computed: int) -> None:
        """Add a step of `computed` tokens. A skipped step adds its time, but neither loss nor trained tokens."""
        self.steps += 1
        self.computed += computed
        self.filled += result.filled
        self.document_lengths += result.document_lengths
        self.own += result.own_seconds
        if result.applied:
            self.useful += sum(result.seconds.values())
            self.tokens += result.tokens
            self._loss_sum += result.loss * result.units
            self._units += result.units
        else:
            self.skipped += 1
        for name, value in result.seconds.items():
            self.seconds[name] = self.seconds.get(name, 0.0) + value

    @property
    def loss(self) -> float:
        return self._loss_sum / max(self._units, 1)


def make_recorder(session: Session, world_size: int) -> Recorder:
    """The recorder of console lines, TensorBoard and metrics.jsonl on rank 0; an empty one elsewhere."""
    if not is_main_rank():
        return Recorder()
    run = Path(session.config.run.dir)
    return open_recorder(session.config, run, session.step, world_size, device_peak(session.device))
