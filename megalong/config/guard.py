"""How a run reacts to a step with a bad loss or gradient."""

from typing import Literal

from pydantic import Field

from megalong.config.architecture import Positive
from megalong.config.section import Section

Action = Literal["skip", "rollback", "stop"]


class Guard(Section):
    """Reactions to a loss or gradient that is NaN, infinite or far above those of the last `window` good steps.

    `skip` keeps the weights and continues with the next batch; `rollback` returns to the last checkpoint and leaves the
    batch out from then on; `stop` ends the run; `log` (spikes only) logs the spike and applies the update. A spike is a
    robust z-score above the threshold: the distance from the median in units of 1.4826 * median absolute deviation. It
    is computed for the loss and for the logarithm of the gradient norm, once half a window of good steps is known. More
    than `max_consecutive` events in a row end the run. `replay` computes such a step a second time from the same
    weights, random states and batch. If any bit of the result differs, the cause is a hardware fault; else it is a bug
    or bad data.
    """

    non_finite: Action = "skip"
    """Reaction to a NaN or infinite loss or gradient norm."""
    loss_spike: Action | Literal["log"] = "log"
    """Reaction to a loss above the threshold."""
    gradient_spike: Action | Literal["log"] = "log"
    """Reaction to a gradient norm above the threshold."""
    window: int = Field(default=64, ge=8)
    """Number of good steps for the median."""
    loss_threshold: float = Field(default=10.0, gt=0)
    """Robust z-score from which a loss is a spike."""
    gradient_threshold: float = Field(default=10.0, gt=0)
    """Robust z-score of the logarithm from which a gradient norm is a spike."""
    max_consecutive: Positive = 3
    """More reactions than this in a row end the run."""
    replay: bool = False
    """Compute such a step a second time, to tell a hardware fault from a bug or bad data."""
