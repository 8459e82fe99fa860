"""Decide whether a step may change the weights: it must be finite and close to recent steps.

    z = (x - median of the window) / max(1.4826 * MAD, floor)        MAD: median absolute deviation

x is the loss, or the logarithm of the gradient norm, because norms span orders of magnitude. Unlike mean and standard
deviation, median and MAD do not move with the outliers that they must find. The floor (1 % of the median loss, 0.1 of
the logarithm) keeps a very quiet stretch from turning every step into a spike. The window contains applied steps only.

Every rank judges the same numbers, gathered from all ranks (`Report`), and so reaches the same verdict.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from statistics import median
from typing import Any

from megalong.batches.skipped_samples import SkippedSamples
from megalong.config.guard import Guard as Settings

_LOSS_FLOOR = 0.01
_LOG_NORM_FLOOR = 0.1


@dataclass(frozen=True)
class Report:
    """The numbers of all ranks for a step, before it changes anything; the same on every rank.

    Attributes:
        step: the step that would be complete, from 1.
        losses: mean loss of the global batch, as each rank computed it.
        norms: norm of the whole gradient, as each rank computed it.
        own_losses: loss summed over each rank's own tokens; 0 before the last pipeline stage.
        own_norms: norm of each rank's own gradient, before the sum over replicas.
    """

    step: int
    losses: Sequence[float]
    norms: Sequence[float]
    own_losses: Sequence[float]
    own_norms: Sequence[float]

    @property
    def loss(self) -> float:
        """The first non-finite loss of any rank, else rank 0's."""
        return next((one for one in self.losses if not math.isfinite(one)), self.losses[0])

    @property
    def norm(self) -> float:
        """The first non-finite norm of any rank, else rank 0's."""
        return next((one for one in self.norms if not math.isfinite(one)), self.norms[0])


@dataclass(frozen=True)
class Event:
    """A step that the guard reacts to.

    Attributes:
        what: a description.
        action: skip, rollback, stop or log.
        ranks: where it came from: all ranks with a non-finite value of their own, or the rank with the largest value.
        samples: positions, in the sample order, of what these ranks read.
        replay: what a second computation of the step showed; None if the step was computed once.
    """

    step: int
    what: str
    action: str
    ranks: tuple[int, ...]
    samples: tuple[int, ...] = ()
    replay: str | None = None

    @property
    def applied(self) -> bool:
        """Whether the step changes the weights all the same."""
        return self.action == "log"

    def __str__(self) -> str:
        replay = f"; {self.replay}" if self.replay else ""
        return f"step {self.step}: {self.what}; rank {_listed(self.ranks)}, sample {_listed(self.samples)}{replay}"


class Guard:
    """Judges steps; its state is part of each checkpoint."""

    def __init__(self, settings: Settings, state: dict[str, Any] | None = None) -> None:
        state = state or {}
        self.settings = settings
        self.skipped_samples = SkippedSamples([(first, last) for first, last in state.get("left_out", [])])
        self._losses: list[float] = list(state.get("losses", []))[-settings.window :]
        self._log_norms: list[float] = list(state.get("log_norms", []))[-settings.window :]
        self._in_a_row, self._last_event = state.get("in_a_row", 0), state.get("last_event", 0)

    def state(self) -> dict[str, Any]:
        """What a checkpoint stores, ready for JSON."""
        return {
            "left_out": [list(one) for one in self.skipped_samples.ranges],
            "losses": self._losses,
            "log_norms": self._log_norms,
            "in_a_row": self._in_a_row,
            "last_event": self._last_event,
        }

    def carry_over(self, previous: Guard) -> None:
        """Copy what must survive a rollback: the skipped samples and the count of events."""
        self.skipped_samples = previous.skipped_samples
        self._in_a_row, self._last_event = previous._in_a_row, previous._last_event

    def judge(self, report: Report) -> Event | None:
        """Return None for a good step, else an event. A step that is applied enters the window."""
        event = self._detect(report)
        if event is None or event.applied:
            self._add_to_window(report)
            return event
        # Steps repeated after a rollback lie before the event, so they do not reset the count.
        self._last_event = max(self._last_event, report.step)
        self._in_a_row += 1
        if self._in_a_row > self.settings.max_consecutive and event.action != "stop":
            what = f"{event.what}; {self._in_a_row} in a row (guard.max_consecutive {self.settings.max_consecutive})"
            return replace(event, what=what, action="stop")
        return event

    def _add_to_window(self, report: Report) -> None:
        if report.step >= self._last_event:
            self._in_a_row = 0
        window = self.settings.window
        self._losses = [*self._losses, report.loss][-window:]
        self._log_norms = [*self._log_norms, _log(report.norm)][-window:]

    def _detect(self, report: Report) -> Event | None:
        settings = self.settings
        for name, value, own in (
            ("loss", report.loss, report.own_losses),
            ("gradient norm", report.norm, report.own_norms),
        ):
            if not math.isfinite(value):
                # Every rank's own value may be finite although the sum over ranks is not.
                ranks = tuple(rank for rank, one in enumerate(own) if not math.isfinite(one)) or (_largest(own),)
                return Event(report.step, f"{name} {value}", settings.non_finite, ranks)
        z = _z(report.loss, self._losses, settings.window, _LOSS_FLOOR, relative=True)
        if z > settings.loss_threshold:
            what = f"loss {report.loss:.4g} is a spike (z {z:.1f}, median {median(self._losses):.4g})"
            return Event(report.step, what, settings.loss_spike, (_largest(report.own_losses),))
        z = _z(_log(report.norm), self._log_norms, settings.window, _LOG_NORM_FLOOR, relative=False)
        if z > settings.gradient_threshold:
            usual = math.exp(median(self._log_norms))
            what = f"gradient norm {report.norm:.4g} is a spike (z {z:.1f}, median {usual:.4g})"
            return Event(report.step, what, settings.gradient_spike, (_largest(report.own_norms),))
        return None


def _z(value: float, window: Sequence[float], size: int, floor: float, relative: bool) -> float:
    """Robust z-score; 0 until the window is half full."""
    if len(window) < size // 2:
        return 0.0
    middle = median(window)
    spread = 1.4826 * median(abs(one - middle) for one in window)
    return (value - middle) / max(spread, floor * abs(middle) if relative else floor, 1e-12)


def _log(norm: float) -> float:
    return math.log(max(norm, 1e-30))


def _largest(values: Sequence[float]) -> int:
    return max(range(len(values)), key=values.__getitem__)


def _listed(numbers: Sequence[int]) -> str:
    if len(numbers) > 8:
        return f"{', '.join(map(str, numbers[:7]))}, … {numbers[-1]} ({len(numbers)} in all)"
    return ", ".join(map(str, numbers)) or "-"
