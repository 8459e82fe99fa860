"""When a signal came: which step is the last, agreed by all ranks, though not all of them may have got it.

Every rank says at the end of each step's gradients whether it has a signal; that rides on what the guard gathers
anyway. If one has, all finish the step, save and leave. A step that takes longer than `runtime.signal_grace_seconds`
is also looked at before each of its micro-batches, over CPU memory: weights change at the end of a step only, so a
step that would not be done in time is dropped there, and what is in memory is the last complete one.

    signal ──▶ agreed before a micro-batch: what is left of the step > what is left of the grace ? drop : go on
               agreed at the step's end: done

How long a step takes is what the last one took, or what its micro-batches so far tell. Under pipeline parallelism
stages are at different micro-batches at any moment and cannot stop together, so a step is always finished there.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator, Sequence

import torch
import torch.distributed as dist

from megalong.config.schema import Config
from megalong.model.batch import MicroBatch
from megalong.runtime import signals
from megalong.runtime.distributed import control_group


def grace_of(config: Config) -> dict[str, float]:
    """Seconds a step may still take after each of the signals.

    SIGTERM comes from what is about to kill, SIGINT from someone who waits. Under SLURM, SIGUSR1 is the warning that
    `slurm.lead_minutes` ask for: half of them are for the step, the other half for the save.
    """
    soon = config.runtime.signal_grace_seconds
    ahead = config.slurm.lead_minutes * 30 if "SLURM_JOB_ID" in os.environ else 0.0
    return {"SIGTERM": soon, "SIGINT": soon, "SIGUSR1": max(soon, ahead)}


class StepDropped(Exception):
    """All ranks left the step before it changed anything."""


class Interrupt:
    """Ranks' agreement about a signal."""

    def __init__(self, grace: dict[str, float], may_drop: bool) -> None:
        """`grace`: seconds by signal; `may_drop`: ranks run the same micro-batch at the same time (no pipeline)."""
        self._grace, self._may_drop = grace, may_drop
        self._step_seconds: float | None = None
        self._control = control_group()
        self._began = time.monotonic()
        self.agreed = False

    def step_begins(self) -> None:
        """To be called when a step begins."""
        self._began = time.monotonic()

    @property
    def elapsed(self) -> float:
        """Seconds of this step so far, on this rank."""
        return time.monotonic() - self._began

    def step_took(self, seconds: float) -> None:
        """The last step's seconds, the same number on every rank."""
        self._step_seconds = seconds

    def before_each(self, batches: Sequence[MicroBatch]) -> Sequence[MicroBatch]:
        """`batches`, between which ranks look whether to drop the step, if it may take too long to be finished.

        Raises, when iterated over:
            StepDropped: on all ranks at the same micro-batch.
        """
        short = self._step_seconds is not None and self._step_seconds <= min(self._grace.values())
        return batches if short or not self._may_drop else _Watched(batches, self)

    def any_rank(self) -> bool:
        """Whether a rank has a signal; all ranks ask together."""
        self.agreed = self._agreed(signals.received() is not None)
        return self.agreed

    def drop_if_late(self, done: int, count: int) -> None:
        """Leave the step if any rank has a signal and would not be done in time; `done` of `count` micro-batches are.

        Raises:
            StepDropped: on all ranks.
        """
        if self._agreed(self._late(done, count)):
            raise StepDropped

    def _late(self, done: int, count: int) -> bool:
        signal = signals.received()
        if signal is None:
            return False
        if done:
            left = self.elapsed / done * (count - done)
        elif self._step_seconds is not None:
            left = self._step_seconds - self.elapsed
        else:
            return True  # nobody knows how long the first step takes, and nothing is lost with it
        return time.monotonic() + left > signal.moment + self._grace[signal.name]

    def _agreed(self, mine: bool) -> bool:
        flag = torch.tensor([float(mine)])
        dist.all_reduce(flag, dist.ReduceOp.MAX, self._control)
        return bool(flag.item())


class _Watched(list[MicroBatch]):
    def __init__(self, batches: Sequence[MicroBatch], interrupt: Interrupt) -> None:
        super().__init__(batches)
        self._interrupt = interrupt

    def __iter__(self) -> Iterator[MicroBatch]:
        for done, batch in enumerate(super().__iter__()):
            self._interrupt.drop_if_late(done, len(self))
            yield batch
