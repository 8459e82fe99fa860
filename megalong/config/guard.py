"""What a run does about a step that it should not learn from."""

from typing import Literal

from pydantic import Field

from megalong.config.architecture import Positive
from megalong.config.section import Section

Action = Literal["skip", "rollback", "stop"]


class Guard(Section):
    """A loss or gradient that is NaN or infinite, and ones far above those of the last `window` good steps.

    `skip` leaves the weights as they are and goes on with the next batch; `rollback` goes back to the last checkpoint
    and leaves the batch out from then on; `stop` ends the run; `log` (spikes only) tells and learns from the step.
    A spike is a robust z-score above the threshold: distance from the median in units of 1.4826 * median absolute
    deviation, of the loss and of the gradient norm's logarithm, once half a window of good steps is known.
    More than `max_consecutive` events in a row end the run. `replay` computes such a step a second time from the same
    weights, random states and batch: another result, bit for bit, tells a hardware fault from a bug or bad data.
    """

    non_finite: Action = "skip"
    """Reaction to a NaN or infinite loss or gradient norm."""
    loss_spike: Action | Literal["log"] = "log"
    """Reaction to a loss above the threshold."""
    gradient_spike: Action | Literal["log"] = "log"
    """Reaction to a gradient norm above the threshold."""
    window: int = Field(default=64, ge=8)
    """Good steps that the median is taken over."""
    loss_threshold: float = Field(default=10.0, gt=0)
    """Robust z-score from which a loss is a spike."""
    gradient_threshold: float = Field(default=10.0, gt=0)
    """Robust z-score of the logarithm from which a gradient norm is a spike."""
    max_consecutive: Positive = 3
    """More reactions than this in a row end the run."""
    replay: bool = False
    """Compute such a step a second time, to tell a hardware fault from a bug or bad data."""
