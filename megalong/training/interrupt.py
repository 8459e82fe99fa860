"""Handle a signal: all ranks agree on the last step, even if only some of them received it.

After the gradients of each step, every rank reports whether it has a signal, in `TrainStep.report`'s all-gather. If one
has, all finish the step, save and exit. If a step takes longer than `runtime.signal_grace_seconds`, ranks also check
before each micro-batch, over gloo. Weights change only at the end of a step, so a step that would not finish in time is
dropped there, and memory holds the last complete step.

    signal ──▶ checked before a micro-batch: remaining step time > remaining grace ? drop : continue
               checked at the end of the step: finished

A step's duration is estimated from the last step, or from its own micro-batches so far. Under pipeline parallelism,
stages are at different micro-batches at any moment and cannot stop together, so the step is always finished.
"""

from __future__ import annotations

import os
import time

import torch
import torch.distributed as dist

from megalong.config.schema import Config
from megalong.runtime import signals
from megalong.runtime.amounts import duration
from megalong.runtime.distributed import control_group


def grace_of(config: Config) -> dict[str, float]:
    """Seconds a step may still take after each of the signals.

    SIGTERM comes from a scheduler that is about to kill the job, SIGINT from a waiting user. Under SLURM, SIGUSR1 comes
    `slurm.lead_minutes` before the time limit: half of them are for the step, the other half for the save.
    """
    soon = config.runtime.signal_grace_seconds
    ahead = config.slurm.lead_minutes * 30 if "SLURM_JOB_ID" in os.environ else 0.0
    return {"SIGTERM": soon, "SIGINT": soon, "SIGUSR1": max(soon, ahead)}


class StepDropped(Exception):
    """All ranks left the step before it changed anything."""


class Interrupt:
    """Agreement of all ranks on a signal, and this rank's progress, for the line printed on a signal."""

    def __init__(self, grace: dict[str, float], may_drop: bool) -> None:
        """`grace`: seconds by signal; `may_drop`: ranks run the same micro-batch at the same time (no pipeline)."""
        self._grace, self._may_drop = grace, may_drop
        self._step_seconds: float | None = None
        self._save_seconds: float | None = None
        self._control = control_group()
        self._began = self._batch_began = time.monotonic()
        self._number = self._done = self._count = 0
        self._doing: str | None = None
        self.agreed = False

    def step_begins(self, number: int) -> None:
        """Call when step `number`, from 1, begins."""
        self._began = self._batch_began = time.monotonic()
        self._number, self._done, self._count, self._doing = number, 0, 0, None

    def begins(self, doing: str) -> None:
        """Call when something other than a step's gradients begins, such as `the validation`."""
        self._doing = doing

    @property
    def elapsed(self) -> float:
        """Seconds of this step so far, on this rank."""
        return time.monotonic() - self._began

    def step_took(self, seconds: float) -> None:
        """The last step's seconds, the same number on every rank."""
        self._step_seconds = seconds

    def save_took(self, seconds: float) -> None:
        """The last save's seconds."""
        self._save_seconds = seconds

    def reached(self, done: int, count: int) -> None:
        """Micro-batch number `done`, from 0, of `count` is about to begin.

        Raises:
            StepDropped: on all ranks, if any has a signal and the step would not finish in time.
        """
        self._done, self._count, self._batch_began = done, count, time.monotonic()
        if self._checks_within_step and self._any(self._too_late(done, count)):
            raise StepDropped

    def any_rank(self) -> bool:
        """Whether any rank has a signal; collective."""
        self.agreed = self._any(signals.received() is not None)
        return self.agreed

    def outlook(self, first: signals.Received) -> str:
        """What the run does about its first signal and how long that may take, estimated from the micro-batches so far.

        Safe in any thread at any moment: it only reads numbers.
        """
        save = "" if self._save_seconds is None else f", which takes about {duration(self._save_seconds)}"
        if self._doing is not None:
            return f"the run is in {self._doing}; it stops as soon as it can and saves{save}"
        place, left = self._progress(), self._remaining(self._done, self._count) if self._count else self._step_seconds
        if not self._checks_within_step:
            known = "" if left is None else f" in about {duration(max(0.0, left))}"
            return f"{place}; the step is finished{known} and saved{save}"
        each = self._micro_batch_seconds()
        if left is None or each is None:
            return (
                f"{place}, and its duration is unknown; the step is dropped before its next micro-batch, and the run "
                f"ends with step {self._number - 1}"
            )
        if time.monotonic() + left <= first.moment + self._grace[first.name]:
            return f"{place}, {duration(each)} each; the step is finished in about {duration(left)} and saved{save}"
        wait = max(0.0, self._batch_began + each - time.monotonic())
        return (
            f"{place}, {duration(each)} each; the step needs {duration(left)} more but has only "
            f"{duration(self._grace[first.name])}: it is dropped after this micro-batch, in about {duration(wait)}, "
            f"and step {self._number - 1} is saved{save}"
        )

    @property
    def _checks_within_step(self) -> bool:
        """Whether ranks check for signals within the step; the same on every rank."""
        short = self._step_seconds is not None and self._step_seconds <= min(self._grace.values())
        return self._may_drop and not short

    def _progress(self) -> str:
        if not self._count:
            return f"step {self._number} waits for its data"
        return f"step {self._number} is in micro-batch {self._done + 1} of {self._count}"

    def _micro_batch_seconds(self) -> float | None:
        """Seconds per micro-batch in this step, or else in the last one."""
        if self._done:
            return (self._batch_began - self._began) / self._done
        return self._step_seconds / self._count if self._step_seconds is not None and self._count else None

    def _remaining(self, done: int, count: int) -> float | None:
        """Remaining seconds of this step after `done` of `count` micro-batches; None if unknown."""
        if done:
            return (self._batch_began - self._began) / done * count - self.elapsed
        return None if self._step_seconds is None else self._step_seconds - self.elapsed

    def _too_late(self, done: int, count: int) -> bool:
        signal = signals.received()
        if signal is None:
            return False
        left = self._remaining(done, count)
        # The first step's duration is unknown, and dropping it loses nothing.
        return left is None or time.monotonic() + left > signal.moment + self._grace[signal.name]

    def _any(self, mine: bool) -> bool:
        flag = torch.tensor([float(mine)])
        dist.all_reduce(flag, dist.ReduceOp.MAX, self._control)
        return bool(flag.item())
