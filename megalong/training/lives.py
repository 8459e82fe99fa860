"""Run one stage to its end, with a fresh set-up after every rollback by the guard.

A rollback starts anew within the same processes. Everything that a restart would read from disk is read again, so
nothing of the bad step remains; before the first save, the first start is repeated. The guard's skipped samples and
event counts are carried over.
"""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Protocol

import torch
import torch.distributed as dist

from megalong.config.schema import Config
from megalong.runtime import signals
from megalong.runtime.distributed import is_main_rank
from megalong.training import events
from megalong.training.guard import Guard
from megalong.training.loop import GUARDED, Outcome, Trainer, make_recorder
from megalong.training.metrics.sinks import Sink
from megalong.training.setup import Session, set_up

log = logging.getLogger("megalong")


class RecorderMaker(Protocol):
    """Makes the recorder of one start."""

    def __call__(self, session: Session, world_size: int) -> Sink: ...


def run_until_finished(config: Config, device: torch.device, make: RecorderMaker = make_recorder) -> Outcome:
    """Run a stage until it is finished, or interrupted by a signal.

    Raises:
        UserError: the guard stops the run, or the world, machine, model or checkpoint does not fit the configuration.
    """
    guard: Guard | None = None
    while True:
        outcome, guard = _run_once(config, device, make, guard)
        if outcome != "rolled back":
            return outcome


def _run_once(
    config: Config, device: torch.device, make: RecorderMaker, previous: Guard | None
) -> tuple[Outcome, Guard]:
    """One start. A function of its own, so that nothing refers to the model while the next start builds its own."""
    run = Path(config.run.dir)
    session = set_up(config, device)
    if previous is not None:
        session.guard.carry_over(previous)
    if session.step >= config.training.train_iters:
        log.info("run %s is complete at step %d", config.run.name, session.step)
        return "finished", session.guard
    if previous is None:
        events.record(run, session.step, "resume" if session.step else "start", world_size=dist.get_world_size())
    recorder = make(session, dist.get_world_size())
    _restore_guard_events(recorder, run, session.step)
    try:
        trainer = Trainer(session, recorder)
        signals.listen_to_all(trainer.interrupt.outlook)
        outcome = trainer.run()
    finally:
        recorder.close()
    if outcome == "finished":
        events.record(run, session.step, "finish", **trainer.token_counts)
    return outcome, session.guard


def _restore_guard_events(recorder: Sink, run: Path, step: int) -> None:
    """Restore the guard's events after `step`, which the recorder has cut off with everything else there."""
    for event in events.read(run) if is_main_rank() else ():
        if event["kind"] in GUARDED and event.get("at", 0) > step:
            recorder.event(event["at"], event["kind"], event["what"])
