"""Where records go: the console, `RUN/metrics.jsonl`, `RUN/tensorboard`.

A run that dies at step 170 and resumes from the checkpoint of step 150 repeats steps 151-170, so what the first life
recorded from step 151 on is removed: every step is recorded once, and no curve runs back and forth.

Recording must never end a run: a failed write is logged as a warning, once.
"""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import torch

from megalong.costs.hardware import Peak
from megalong.runtime import json_lines
from megalong.runtime.amounts import utc_now
from megalong.training.health import Health
from megalong.training.metrics.console import RemainingTime, step_line
from megalong.training.metrics.record import StepRecord

LOG = logging.getLogger("megalong")
FLUSH_SECONDS = 10
HEALTH = "z_health"


class Sink:
    """Receives what rank 0 records of a run; a sink ignores what it has no use for."""

    def step(self, record: StepRecord) -> None:
        """Record a logged step."""

    def health(self, step: int, health: Health) -> None:
        """Record the run's health at a logged step."""

    def event(self, step: int, kind: str, text: str) -> None:
        """Record a guard event; `text` describes it."""

    def flush(self) -> None:
        """Write everything to disk."""

    def close(self) -> None:
        """Flush, and close open files; nothing is recorded afterwards."""


class Console(Sink):
    """One line per logged step (console.py)."""

    def __init__(self, remaining: RemainingTime, peak: Peak) -> None:
        self._remaining, self._peak = remaining, peak

    def step(self, record: StepRecord) -> None:
        """See `Sink`."""
        left = self._remaining.after(record.step)
        LOG.info("%s", step_line(record, self._remaining.total_steps, self._peak, left))


class MetricsFile(Sink):
    """`RUN/metrics.jsonl`: one JSON object per logged step (docs/training.md lists its keys)."""

    NAME = "metrics.jsonl"

    def __init__(self, run: Path, start_step: int, peak: Peak) -> None:
        """Cuts off steps after `start_step`."""
        self._file, self._peak, self._failed = run / self.NAME, peak, False
        try:
            json_lines.cut(self._file, lambda values: values.get("step", 0) <= start_step)
        except OSError as error:
            self._give_up(error)

    def step(self, record: StepRecord) -> None:
        """See `Sink`."""
        if self._failed:
            return
        try:
            json_lines.append(self._file, {"time": utc_now(), **record.numbers(self._peak)})
        except OSError as error:
            self._give_up(error)

    def _give_up(self, error: OSError) -> None:
        self._failed = True
        LOG.warning("%s: %s; steps are not recorded there until the next start", self._file, error.strerror)


class TensorBoard(Sink):
    """Curves named `group/name`, so that TensorBoard shows one panel per subject.

    It sorts groups by name: loss comes first, and z_health, which one reads only when something is wrong, comes last.
    (The few events of a run that skipped steps, guard, come before the loss.)
    """

    def __init__(self, run: Path, start_step: int, peak: Peak) -> None:
        """Purges steps after `start_step`."""
        self._peak = peak
        # Imported here: it costs a second, and only one rank of hundreds needs it.
        from torch.utils.tensorboard import SummaryWriter

        self._writer: Any = SummaryWriter(str(run / "tensorboard"), purge_step=start_step + 1, flush_secs=FLUSH_SECONDS)

    def text(self, name: str, text: str, step: int) -> None:
        """Add Markdown to the tab Text."""
        self._writer.add_text(name, text, step)

    def step(self, record: StepRecord) -> None:
        """See `Sink`."""
        scalars: dict[str, float | None] = {
            "loss/train": record.loss,
            "loss/validation": record.validation_loss,
            "schedule/learning_rate": record.learning_rate,
            "schedule/gradient_norm": record.gradient_norm,
            "speed/tokens_per_s": record.tokens_per_second,
            "speed/tokens_per_s_per_gpu": record.tokens_per_second_per_gpu,
            "speed/learnt_tokens_per_s": record.trained_per_second,
            "speed/padding_share": record.padding,
            "speed/mfu": record.utilization(self._peak),
            "memory/peak_gib": record.peak_memory / 2**30,
            "progress/consumed_tokens": record.consumed_tokens,
            **{f"time/{name}": value for name, value in record.seconds_each.items()},
            **{f"loss_by_position/{bucket}": loss for bucket, loss in record.position_losses.items()},
            **{
                f"validation_loss_by_position/{bucket}": loss
                for bucket, loss in record.validation_position_losses.items()
            },
        }
        for name, value in scalars.items():
            if value is not None:
                self._writer.add_scalar(name, value, record.step)

    def health(self, step: int, health: Health) -> None:
        """The curves of `health.py`, and how a step's own seconds are spread over the ranks."""
        for name, value in health.scalars.items():
            self._writer.add_scalar(f"{HEALTH}/{name}", value, step)
        self._writer.add_histogram(f"{HEALTH}/own_step_s_by_rank", torch.tensor(health.own_seconds), step)

    def event(self, step: int, kind: str, text: str) -> None:
        """A point in the curve of its kind, and the text."""
        self._writer.add_scalar(f"guard/{kind}", 1, step)
        self._writer.add_text("guard/events", text, step)
        self._writer.flush()

    def flush(self) -> None:
        """See `Sink`."""
        self._writer.flush()

    def close(self) -> None:
        """See `Sink`."""
        self._writer.close()
