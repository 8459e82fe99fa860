"""One record of a logged step, which goes from the loop to every sink.

    tokens/s = tokens of the record / its wall seconds          tokens/s/GPU = tokens/s / world size
    MFU      = tokens/s/GPU x model FLOPs per token (costs/flops.py) / peak of the device (costs/hardware.py)

Rates count all tokens that the model computes, so that pretraining and fine-tuning compare: prompts and padding cost as
much as trained tokens. The numbers of trained and padding tokens are recorded too.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from megalong.costs.hardware import Peak

OCCASIONAL = ("checkpoint", "evaluation")  # timed as a whole; the rest is part of every step


@dataclass(frozen=True)
class StepRecord:
    """Measurements of one logged step (or of `logging.log_interval` steps together), over all ranks.

    Attributes:
        step: steps done so far, this one included; the first is 1.
        steps: how many steps this record covers.
        loss: mean training loss in nats per valid token.
        learning_rate: of this step.
        tokens: tokens computed since the last record, over the whole world.
        consumed_tokens: tokens computed since the run began, earlier lives included.
        seconds: wall seconds since the last record by activity: `data`, `forward_backward`, `optimizer`, `checkpoint`,
            ...; rates divide by their sum without `checkpoint` and `evaluation`.
        world_size: processes.
        gradient_norm: before clipping; None where it was not computed.
        validation_loss: held-out loss in nats, on steps with an evaluation.
        position_losses: mean training loss by bucket of positions, such as "0-1024"; None in an empty bucket.
        validation_position_losses: the same for held-out text.
        trained_tokens: those of `tokens` that count in the loss; None: all.
        padding_tokens: those of `tokens` that are padding.
        flops_per_token: of the model, averaged over the documents read.
        peak_memory: peak memory of this process in bytes.
    """

    step: int
    steps: int
    loss: float
    learning_rate: float
    tokens: int
    consumed_tokens: int
    seconds: Mapping[str, float]
    world_size: int
    gradient_norm: float | None = None
    validation_loss: float | None = None
    position_losses: Mapping[str, float | None] = field(default_factory=dict)
    validation_position_losses: Mapping[str, float | None] = field(default_factory=dict)
    trained_tokens: int | None = None
    padding_tokens: int = 0
    flops_per_token: float = 0.0
    peak_memory: int = 0

    @property
    def trained(self) -> int:
        """Tokens that count in the loss."""
        return self.tokens if self.trained_tokens is None else self.trained_tokens

    @property
    def padding(self) -> float:
        """Padding's share of the tokens."""
        return self.padding_tokens / max(self.tokens, 1)

    @property
    def tokens_per_second(self) -> float:
        """Over the whole world, without the time for saves and evaluations."""
        own = sum(value for name, value in self.seconds.items() if name not in OCCASIONAL)
        return self.tokens / max(own, 1e-9)

    @property
    def tokens_per_second_per_gpu(self) -> float:
        """Per process."""
        return self.tokens_per_second / self.world_size

    @property
    def trained_per_second(self) -> float:
        """Trained tokens per second, over the whole world."""
        return self.tokens_per_second * self.trained / max(self.tokens, 1)

    def utilization(self, peak: Peak) -> float:
        """Model FLOPs utilization (MFU) of devices with this peak, 0 to 1."""
        return self.tokens_per_second_per_gpu * self.flops_per_token / peak.flops_per_second

    @property
    def seconds_each(self) -> dict[str, float]:
        """`seconds` per step; for a checkpoint or an evaluation, of the whole."""
        return {name: value / (1 if name in OCCASIONAL else self.steps) for name, value in self.seconds.items()}

    def numbers(self, peak: Peak) -> dict[str, Any]:
        """All values under their names in `RUN/metrics.jsonl`, MFU against `peak`; unmeasured values are left out."""
        found = {
            "step": self.step,
            "loss": self.loss,
            "validation_loss": self.validation_loss,
            "learning_rate": self.learning_rate,
            "gradient_norm": self.gradient_norm,
            "consumed_tokens": self.consumed_tokens,
            "tokens": self.tokens,
            "learnt_tokens": self.trained,
            "padding_tokens": self.padding_tokens,
            "tokens_per_s": self.tokens_per_second,
            "tokens_per_s_per_gpu": self.tokens_per_second_per_gpu,
            "mfu": self.utilization(peak),
            "peak_gib": self.peak_memory / 2**30,
            "seconds": self.seconds_each,
            "loss_by_position": _known(self.position_losses),
            "validation_loss_by_position": _known(self.validation_position_losses),
        }
        return {name: value for name, value in found.items() if value is not None and value != {}}


def _known(losses: Mapping[str, float | None]) -> dict[str, float]:
    return {bucket: loss for bucket, loss in losses.items() if loss is not None}
