"""Run one stage to its end, with a fresh set-up after every rollback by the guard.

Going back to the last checkpoint is done by starting anew within the same processes: whatever a restart would read from
disk is read, so nothing of the bad step can stay behind, and before the first save it is the first start that is
repeated. What the guard has learnt is carried over.
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
        outcome, guard = _life(config, device, make, guard)
        if outcome != "rolled back":
            return outcome


def _life(config: Config, device: torch.device, make: RecorderMaker, before: Guard | None) -> tuple[Outcome, Guard]:
    """A function of its own, so that nothing holds the model while the next life builds its own."""
    run = Path(config.run.dir)
    session = set_up(config, device)
    if before is not None:
        session.guard.carry_over(before)
    if session.step >= config.training.train_iters:
        log.info("run %s is complete at step %d", config.run.name, session.step)
        return "finished", session.guard
    if before is None:
        events.record(run, session.step, "resume" if session.step else "start", world_size=dist.get_world_size())
    recorder = make(session, dist.get_world_size())
    _record_again(recorder, run, session.step)
    try:
        trainer = Trainer(session, recorder)
        signals.listen_to_all(trainer.interrupt.outlook)
        outcome = trainer.run()
    finally:
        recorder.close()
    if outcome == "finished":
        events.record(run, session.step, "finish", **trainer.read)
    return outcome, session.guard


def _record_again(recorder: Sink, run: Path, step: int) -> None:
    """Curves forget what earlier lives wrote beyond `step`; what the guard did there is to stay."""
    for event in events.read(run) if is_main_rank() else ():
        if event["kind"] in GUARDED and event.get("at", 0) > step:
            recorder.event(event["at"], event["kind"], event["what"])
