"""The console line of a logged step: progress, loss, speed and remaining time.

    step 120/400 (30 %) | loss 3.2141 | lr 2.9e-03 | norm 0.81 | 12.3K tok/s | MFU 31 % | 1.2 GiB | ETA 2m10s
    step 120/400 (30 %) | … | 12.3K tok/s (3.10K learnt, 4 % padding) | …      if not all tokens count in the loss

The remaining time comes from the wall clock between the last lines, not from the step's own timers, so it includes
evaluation and checkpoints. The first interval after a start is left out, because it includes warm-up.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable

from megalong.costs.hardware import Peak
from megalong.runtime.amounts import amount, duration
from megalong.training.metrics.record import StepRecord

REMEMBERED = 20
ALL = 0.99  # a share that counts as all tokens: the last token of a masked document has no target


class RemainingTime:
    """Seconds left, from the pace of the last `REMEMBERED` reports."""

    def __init__(self, total_steps: int, clock: Callable[[], float] = time.monotonic) -> None:
        self.total_steps = total_steps
        self._clock = clock
        self._seen: deque[tuple[int, float]] = deque(maxlen=REMEMBERED)

    def after(self, step: int) -> float | None:
        """Seconds until `total_steps`, now that `step` has just ended; None before the pace is known."""
        self._seen.append((step, self._clock()))
        first_step, first_time = self._seen[0]
        last_step, last_time = self._seen[-1]
        if last_step == first_step:
            return None
        return (last_time - first_time) / (last_step - first_step) * (self.total_steps - last_step)


def step_line(record: StepRecord, total_steps: int, peak: Peak, seconds_left: float | None) -> str:
    """The line above, with MFU against `peak`; unknown values are left out."""
    rate = f"{amount(record.tokens_per_second)} tok/s"
    if record.trained_per_second < ALL * record.tokens_per_second:
        rate += f" ({amount(record.trained_per_second)} learnt, {100 * record.padding:.0f} % padding)"
    parts = [
        f"step {record.step}/{total_steps} ({100 * record.step // total_steps} %)",
        f"loss {record.loss:.4f}",
        None if record.validation_loss is None else f"held-out {record.validation_loss:.4f}",
        f"lr {record.learning_rate:.1e}",
        None if record.gradient_norm is None else f"norm {record.gradient_norm:.2f}",
        rate,
        f"MFU {100 * record.utilization(peak):.0f} %",
        f"{record.peak_memory / 2**30:.1f} GiB",
        None if seconds_left is None else f"ETA {duration(seconds_left)}",
    ]
    return " | ".join(part for part in parts if part is not None)
