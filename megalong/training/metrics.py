"""What a run tells about itself: a line a step on the console, curves in TensorBoard.

Both start from one `StepRecord` a logged step; rates and shares are worked out here, in one place:

    tokens/s = tokens of the record / its wall seconds          tokens/s/GPU = tokens/s / world size
    MFU      = tokens/s/GPU x model FLOPs per token (flops.py) / peak of the device (hardware.py)

Both are of all tokens that the model computes, so that pretraining and fine-tuning compare: prompts, which are read and
not learnt, and padding cost as much as others. How many are learnt and how much is padding is told beside them.

Curves are named `group/name` so that TensorBoard shows one panel a subject: loss, loss_by_position, schedule, speed,
time (seconds a step; of a checkpoint or an evaluation as a whole), memory, progress. It shows them in the order of
their names: loss comes first, and what is looked at only when something is wrong, z_health, last (a run that skipped
steps has its few events, guard, before the loss). Only the writer rank writes; elsewhere a `Metrics` does nothing.

A run that dies at step 170 and resumes from the checkpoint of step 150 does steps 151-170 again. `purge_step` tells
TensorBoard to forget what the first life wrote from step 151 on, so a curve never runs back and forth (zigzag).
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path

import torch

from megalong.config.architecture import Architecture
from megalong.config.schema import Config
from megalong.config.text import config_text
from megalong.evaluation.buckets import bucket_edges
from megalong.training.console import RemainingTime, step_line
from megalong.training.flops import mean_flops_per_token
from megalong.training.hardware import Peak, device_peak, peak_memory
from megalong.training.health import Health

LOG = logging.getLogger("megalong")
FLUSH_SECONDS = 10
HEALTH = "z_health"
OCCASIONAL = ("checkpoint", "evaluation")  # timed as a whole; the rest is time of every step


@dataclass(frozen=True)
class StepRecord:
    """What one logged step (or `logging.log_interval` steps together) was like, over all ranks.

    Attributes:
        step: steps done so far, this one included; the first is 1.
        loss: mean training loss in nats per valid token.
        learning_rate: of this step.
        tokens: tokens computed since the last record, over the whole world.
        consumed_tokens: tokens computed since the run began, earlier lives included.
        seconds: wall seconds since the last record spent on `data`, `forward_backward`, `optimizer`, `checkpoint`, ...;
            their sum without `checkpoint` and `evaluation` is the step time that rates are worked out from.
        gradient_norm: before clipping; None where it was not computed.
        validation_loss: held-out loss in nats, on steps that evaluated.
        position_losses: mean training loss per bucket of `bucket_edges(data.positions)`; None in an empty bucket.
        validation_position_losses: the same for held-out text.
        learnt_tokens: those of `tokens` that are predicted and learnt from; None: all.
        padding_tokens: those of `tokens` that fill samples up.
        document_lengths: of what the writing rank's replica read, for MFU; none: whole samples.
    """

    step: int
    loss: float
    learning_rate: float
    tokens: int
    consumed_tokens: int
    seconds: Mapping[str, float]
    gradient_norm: float | None = None
    validation_loss: float | None = None
    position_losses: Sequence[float | None] = field(default=())
    validation_position_losses: Sequence[float | None] = field(default=())
    document_lengths: Sequence[int] = field(default=())
    learnt_tokens: int | None = None
    padding_tokens: int = 0

    @property
    def learnt(self) -> int:
        """Tokens that are learnt from."""
        return self.tokens if self.learnt_tokens is None else self.learnt_tokens

    @property
    def padding(self) -> float:
        """Its share of the tokens."""
        return self.padding_tokens / max(self.tokens, 1)

    @property
    def step_seconds(self) -> float:
        """Wall seconds of the steps themselves, without saving and evaluating."""
        return sum(value for name, value in self.seconds.items() if name not in OCCASIONAL)


class Metrics:
    """Writes `StepRecord`s of one run to its console line and to `RUN/tensorboard`."""

    def __init__(
        self,
        config: Config,
        run_dir: Path,
        start_step: int,
        is_writer_rank: bool,
        *,
        architecture: Architecture,
        world_size: int,
        device: torch.device,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Open the run's curves.

        Args:
            start_step: steps already done in earlier lives (0 at a fresh start); later ones on disk are purged.
            is_writer_rank: true on the single rank that writes.
            clock: monotonic seconds, replaced by tests.
        """
        self._writer = None
        self._active = is_writer_rank
        if not is_writer_rank:
            return
        self._config, self._world_size, self._device = config, world_size, device
        self._last_step = start_step
        self._edges = bucket_edges(config.data.seq_length)
        self._train_edges = bucket_edges(config.data.positions)
        self._architecture = architecture
        self._peak = device_peak(device)
        self._remaining = RemainingTime(config.training.train_iters, clock)
        if config.logging.tensorboard:
            # Imported here: it costs a second, and only one rank of hundreds needs it.
            from torch.utils.tensorboard import SummaryWriter

            self._writer = SummaryWriter(
                str(run_dir / "tensorboard"), purge_step=start_step + 1, flush_secs=FLUSH_SECONDS
            )
            self._writer.add_text("config", _config_text(config, self._peak, world_size), start_step)

    def log_step(self, record: StepRecord) -> None:
        """One console line and one point on every curve."""
        if not self._active:
            return
        steps, self._last_step = record.step - self._last_step, record.step
        tokens_per_second = record.tokens / max(record.step_seconds, 1e-9)
        flops = mean_flops_per_token(self._architecture, record.document_lengths or [self._config.data.seq_length])
        utilization = tokens_per_second / self._world_size * flops / self._peak.flops_per_second
        memory = peak_memory(self._device)
        LOG.info(
            step_line(
                step=record.step,
                total_steps=self._config.training.train_iters,
                loss=record.loss,
                learning_rate=record.learning_rate,
                gradient_norm=record.gradient_norm,
                tokens_per_second=tokens_per_second,
                learnt_per_second=tokens_per_second * record.learnt / max(record.tokens, 1),
                padding=record.padding,
                utilization=utilization,
                peak_memory_bytes=memory,
                validation_loss=record.validation_loss,
                seconds_left=self._remaining.after(record.step),
            )
        )
        self._write(record, steps, tokens_per_second, utilization, memory)

    def _write(self, record: StepRecord, steps: int, tokens_per_second: float, utilization: float, memory: int) -> None:
        if self._writer is None:
            return
        scalars: dict[str, float | None] = {
            "loss/train": record.loss,
            "loss/validation": record.validation_loss,
            "schedule/learning_rate": record.learning_rate,
            "schedule/gradient_norm": record.gradient_norm,
            "speed/tokens_per_s": tokens_per_second,
            "speed/tokens_per_s_per_gpu": tokens_per_second / self._world_size,
            "speed/learnt_tokens_per_s": tokens_per_second * record.learnt / max(record.tokens, 1),
            "speed/padding_share": record.padding,
            "speed/mfu": utilization,
            "memory/peak_gib": memory / 2**30,
            "progress/consumed_tokens": record.consumed_tokens,
            **{f"time/{name}": value / (1 if name in OCCASIONAL else steps) for name, value in record.seconds.items()},
            **self._by_position("loss_by_position", record.position_losses, self._train_edges),
            **self._by_position("validation_loss_by_position", record.validation_position_losses, self._edges),
        }
        for name, value in scalars.items():
            if value is not None:
                self._writer.add_scalar(name, value, record.step)

    def _by_position(self, group: str, losses: Sequence[float | None], edges: Sequence[int]) -> dict[str, float | None]:
        # Plain numbers, not "1K": TensorBoard sorts names by the numbers in them.
        names = [f"{group}/{low}-{high}" for low, high in pairwise(edges)]
        return dict(zip(names, losses, strict=True)) if losses else {}

    def log_health(self, step: int, health: Health) -> None:
        """The curves of `health.py`, and how a step's own seconds are spread over the ranks."""
        if self._writer is None:
            return
        for name, value in health.scalars.items():
            self._writer.add_scalar(f"{HEALTH}/{name}", value, step)
        self._writer.add_histogram(f"{HEALTH}/own_step_s_by_rank", torch.tensor(health.own_seconds), step)

    def log_event(self, step: int, kind: str, told: str) -> None:
        """Mark a step the guard was against: a spike in the curve of its kind, and the words."""
        if self._writer is not None:
            self._writer.add_scalar(f"guard/{kind}", 1, step)
            self._writer.add_text("guard/events", told, step)
            self._writer.flush()

    def flush(self) -> None:
        """Put everything on disk; called with each checkpoint, so that no step before it can be lost."""
        if self._writer is not None:
            self._writer.flush()

    def close(self) -> None:
        """Flush and close the curves."""
        if self._writer is not None:
            self._writer.close()


def _config_text(config: Config, peak: Peak, world_size: int) -> str:
    """The resolved configuration as a Markdown code block, headed by what MFU is measured against."""
    indented = "".join(f"    {line}\n" for line in config_text(config).splitlines())
    against = f"{peak.flops_per_second / 1e12:.3g} TFLOP/s ({peak.source})"
    return f"{world_size} processes; MFU is against {against} each.\n\n{indented}"
