"""One line a step for people: where the run is, whether it learns, how fast, and when it will be done.

    step 120/400 (30 %) | loss 3.2141 | lr 2.9e-03 | norm 0.81 | 12.3K tok/s | MFU 31 % | 1.2 GiB | ETA 2m10s
    step 120/400 (30 %) | … | 12.3K tok/s (3.10K learnt, 4 % padding) | …      where not all tokens are learnt

The remaining time comes from the wall clock between the last lines, not from the step's own timers, so evaluation and
checkpoints are in it. The first interval after a start is left out (it pays for warming up).
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable

REMEMBERED = 20
ALL = 0.99  # a share of tokens that is as good as all: where documents are masked their last tokens predict nothing


class RemainingTime:
    """Seconds left, from the pace of the last `REMEMBERED` reports."""

    def __init__(self, total_steps: int, clock: Callable[[], float] = time.monotonic) -> None:
        self._total = total_steps
        self._clock = clock
        self._seen: deque[tuple[int, float]] = deque(maxlen=REMEMBERED)

    def after(self, step: int) -> float | None:
        """Seconds until `total_steps` are done, told that `step` just ended; None before the pace is known."""
        self._seen.append((step, self._clock()))
        first_step, first_time = self._seen[0]
        last_step, last_time = self._seen[-1]
        if last_step == first_step:
            return None
        return (last_time - first_time) / (last_step - first_step) * (self._total - last_step)


def duration(seconds: float) -> str:
    """`45s`, `2m10s`, `3h05m`, `2d04h`."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole}s"
    if whole < 3600:
        return f"{whole // 60}m{whole % 60:02d}s"
    if whole < 86400:
        return f"{whole // 3600}h{whole % 3600 // 60:02d}m"
    return f"{whole // 86400}d{whole % 86400 // 3600:02d}h"


def amount(value: float) -> str:
    """Three digits and a letter: `987`, `12.3K`, `4.20M`, `1.05B`."""
    for limit, letter in ((1e9, "B"), (1e6, "M"), (1e3, "K")):
        if value >= limit:
            scaled = value / limit
            return f"{scaled:.{2 if scaled < 10 else 1 if scaled < 100 else 0}f}{letter}"
    return f"{value:.0f}"


def step_line(
    *,
    step: int,
    total_steps: int,
    loss: float,
    learning_rate: float,
    gradient_norm: float | None,
    tokens_per_second: float,
    learnt_per_second: float,
    padding: float,
    utilization: float,
    peak_memory_bytes: int,
    validation_loss: float | None,
    seconds_left: float | None,
) -> str:
    """The line in the module's docstring; parts that are None are left out.

    Args:
        tokens_per_second: of all tokens computed; learnt_per_second: of those that are predicted.
        padding: its share of the tokens computed.
    """
    rate = f"{amount(tokens_per_second)} tok/s"
    if learnt_per_second < ALL * tokens_per_second:
        rate += f" ({amount(learnt_per_second)} learnt, {100 * padding:.0f} % padding)"
    parts = [
        f"step {step}/{total_steps} ({100 * step // total_steps} %)",
        f"loss {loss:.4f}",
        None if validation_loss is None else f"held-out {validation_loss:.4f}",
        f"lr {learning_rate:.1e}",
        None if gradient_norm is None else f"norm {gradient_norm:.2f}",
        rate,
        f"MFU {100 * utilization:.0f} %",
        f"{peak_memory_bytes / 2**30:.1f} GiB",
        None if seconds_left is None else f"ETA {duration(seconds_left)}",
    ]
    return " | ".join(part for part in parts if part is not None)
