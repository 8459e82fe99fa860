"""The recorder of a run: it sends every record to each configured sink. Only rank 0 writes."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from megalong.config.schema import Config
from megalong.config.text import config_text
from megalong.costs.hardware import Peak
from megalong.training.health import Health
from megalong.training.metrics.console import RemainingTime
from megalong.training.metrics.record import StepRecord
from megalong.training.metrics.sinks import Console, MetricsFile, Sink, TensorBoard


class Recorder(Sink):
    """A sink that passes everything on to others; without any, as on all ranks but 0, it does nothing."""

    def __init__(self, sinks: Sequence[Sink] = ()) -> None:
        self.sinks = sinks

    def step(self, record: StepRecord) -> None:
        """See `Sink`."""
        for sink in self.sinks:
            sink.step(record)

    def health(self, step: int, health: Health) -> None:
        """See `Sink`."""
        for sink in self.sinks:
            sink.health(step, health)

    def event(self, step: int, kind: str, text: str) -> None:
        """See `Sink`."""
        for sink in self.sinks:
            sink.event(step, kind, text)

    def flush(self) -> None:
        """See `Sink`; called with each checkpoint, so that no step before it can be lost."""
        for sink in self.sinks:
            sink.flush()

    def close(self) -> None:
        """See `Sink`."""
        for sink in self.sinks:
            sink.close()


def open_recorder(config: Config, run: Path, start_step: int, world_size: int, peak: Peak) -> Recorder:
    """The sinks of a run that continues from `start_step` (0 for a new run); MFU is measured against `peak`."""
    remaining = RemainingTime(config.training.train_iters)
    sinks: list[Sink] = [Console(remaining, peak), MetricsFile(run, start_step, peak)]
    if config.logging.tensorboard:
        board = TensorBoard(run, start_step, peak)
        board.text("config", _config_text(config, peak, world_size), start_step)
        sinks.append(board)
    return Recorder(sinks)


def _config_text(config: Config, peak: Peak, world_size: int) -> str:
    """The resolved configuration as a Markdown code block, below a line that names the peak for MFU."""
    indented = "".join(f"    {line}\n" for line in config_text(config).splitlines())
    against = f"{peak.flops_per_second / 1e12:.3g} TFLOP/s ({peak.source})"
    return f"{world_size} processes; MFU is against {against} each.\n\n{indented}"
