"""One record of a logged step, from the loop to every sink.

    tokens/s = tokens of the record / its wall seconds          tokens/s/GPU = tokens/s / world size
    MFU      = tokens/s/GPU x model FLOPs per token (costs/flops.py) / peak of the device (costs/hardware.py)

Rates are of all tokens that the model computes, so that pretraining and fine-tuning compare: prompts, which are read
and not learnt, and padding cost as much as others. How many are learnt and how much is padding is recorded beside them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from megalong.costs.hardware import Peak

OCCASIONAL = ("checkpoint", "evaluation")  # timed as a whole; the rest is time of every step


@dataclass(frozen=True)
class StepRecord:
    """What one logged step (or `logging.log_interval` steps together) was like, over all ranks.

    Attributes:
        step: steps done so far, this one included; the first is 1.
        steps: how many this record is of.
        loss: mean training loss in nats per valid token.
        learning_rate: of this step.
        tokens: tokens computed since the last record, over the whole world.
        consumed_tokens: tokens computed since the run began, earlier lives included.
        seconds: wall seconds since the last record spent on `data`, `forward_backward`, `optimizer`, `checkpoint`, ...;
            their sum without `checkpoint` and `evaluation` is the step time that rates are worked out from.
        world_size: processes.
        gradient_norm: before clipping; None where it was not computed.
        validation_loss: held-out loss in nats, on steps that evaluated.
        position_losses: mean training loss by bucket of positions, such as "0-1024"; None in an empty bucket.
        validation_position_losses: the same for held-out text.
        learnt_tokens: those of `tokens` that are predicted and learnt from; None: all.
        padding_tokens: those of `tokens` that fill samples up.
        flops_per_token: of the model, averaged over the documents read.
        peak_memory: bytes that this process has had in use at most.
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
    learnt_tokens: int | None = None
    padding_tokens: int = 0
    flops_per_token: float = 0.0
    peak_memory: int = 0

    @property
    def learnt(self) -> int:
        """Tokens that are learnt from."""
        return self.tokens if self.learnt_tokens is None else self.learnt_tokens

    @property
    def padding(self) -> float:
        """Its share of the tokens."""
        return self.padding_tokens / max(self.tokens, 1)

    @property
    def tokens_per_second(self) -> float:
        """Over the whole world, without the time of saving and evaluating."""
        own = sum(value for name, value in self.seconds.items() if name not in OCCASIONAL)
        return self.tokens / max(own, 1e-9)

    @property
    def tokens_per_second_per_gpu(self) -> float:
        """Of one process."""
        return self.tokens_per_second / self.world_size

    @property
    def learnt_per_second(self) -> float:
        """Tokens learnt from, over the whole world."""
        return self.tokens_per_second * self.learnt / max(self.tokens, 1)

    def utilization(self, peak: Peak) -> float:
        """Model FLOPs utilization (MFU) of devices with this peak, 0 to 1."""
        return self.tokens_per_second_per_gpu * self.flops_per_token / peak.flops_per_second

    @property
    def seconds_each(self) -> dict[str, float]:
        """`seconds` of one step; of a checkpoint or an evaluation as a whole."""
        return {name: value / (1 if name in OCCASIONAL else self.steps) for name, value in self.seconds.items()}

    def numbers(self, peak: Peak) -> dict[str, Any]:
        """Everything, MFU against `peak`, under the names of `RUN/metrics.jsonl`; what was not measured is left out."""
        found = {
            "step": self.step,
            "loss": self.loss,
            "validation_loss": self.validation_loss,
            "learning_rate": self.learning_rate,
            "gradient_norm": self.gradient_norm,
            "consumed_tokens": self.consumed_tokens,
            "tokens": self.tokens,
            "learnt_tokens": self.learnt,
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
