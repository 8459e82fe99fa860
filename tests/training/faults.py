"""What a rank of the worker pool runs in the tests of the guard and of signals: a run in which something goes wrong."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest.mock import patch
from zlib import crc32

import torch
import torch.distributed as dist

from megalong.config.schema import Config
from megalong.runtime import distributed, signals


@dataclass
class Fault:
    """What goes wrong on `rank` in every step (or the first time only) that reads the sample at `place`.

    On CPUs only, where forward passes run when they are called.

    `what`: loss, gradient (one element becomes NaN), spike (the loss is 50 times what it should be), signal (SIGTERM
    within the forward pass of micro-batch number `micro_batch`, 0: before the first), saving and evaluating (SIGTERM
    within every save, and within the first evaluation).
    """

    what: str
    place: int
    rank: int = 1
    once: bool = False
    micro_batch: int = 0


def faulty_run(
    settings: dict[str, Any], faults: list[Fault], skipped_samples: list[int] | None = None
) -> dict[str, Any]:
    """Run a stage as `megalong train` does, with faults.

    Args:
        skipped_samples: places in the order of samples that the run never sees.

    Returns:
        the outcome; a digest of this rank's weights after each step done; the steps logged; what
        the curves were told of the guard.
    """
    config = Config.model_validate(settings)
    device = torch.device("cpu")
    Path(config.run.dir).mkdir(parents=True, exist_ok=True)
    distributed.start(device)
    from megalong.training.lives import run_until_finished
    from megalong.training.loop import Trainer
    from tests.training.workers import _Records

    digests: dict[int, int] = {}
    records = _Records()
    before = Trainer._one_step

    def observed(self: Trainer) -> Any:
        if skipped_samples:
            self.session.guard.skipped_samples.add_places(skipped_samples)
            self.train = self._batches("train")
            skipped_samples.clear()
        outcome = before(self)
        digests[self.session.step] = digest(self.session)
        return outcome

    signals.listen()
    try:
        with ExitStack() as stack:
            stack.enter_context(patch.object(Trainer, "_one_step", observed))
            for fault in faults:
                stack.enter_context(happening(fault))
            outcome = run_until_finished(config, device, lambda session, world_size: records)  # type: ignore[arg-type,return-value]
    finally:
        signals.restore_handlers()
        distributed.clear_grid()
    return {
        "outcome": outcome,
        "digests": digests,
        "steps": [record["step"] for record in records.kept],
        "told": records.told,
    }


def digest(session: Any) -> int:
    """Of this rank's weights, which tell of the optimizer's state one step later, and of delayed FP8 scales."""
    value = 0
    for chunk in session.chunks:
        scalings = [module.scaling for module in chunk.modules() if hasattr(module, "scaling")]
        scales = [tensor for scaling in scalings for tensor in (scaling.scales, scaling.amax)]
        for tensor in (*chunk.parameters(), *scales):
            value = crc32(tensor.detach().contiguous().view(torch.uint8).numpy().tobytes(), value)
    return value


@contextmanager
def happening(fault: Fault) -> Iterator[None]:
    """Let `fault` happen on this rank."""
    from megalong.batches.loader import Batches
    from megalong.model import schedule
    from megalong.training import loop, setup
    from megalong.training.step import TrainStep

    reached, times, micro_batches = False, 0, 0
    read, losses, finalize = Batches.at, schedule._sum_of_losses, TrainStep._finalize

    def at(self: Batches, consumed: int) -> Any:
        nonlocal reached, micro_batches
        replicas = range(self._order.replicas)
        reached, micro_batches = fault.place in self.places(consumed, replicas), 0
        batches = read(self, consumed)
        if due("signal") and fault.micro_batch == 0:
            happen()
            os.kill(os.getpid(), signal.SIGTERM)
        return batches

    def due(what: str) -> bool:
        mine = dist.get_rank() == fault.rank and fault.what == what
        return reached and mine and not (fault.once and times)

    def happen() -> None:
        nonlocal times
        times += 1

    def sum_of_losses(batch: Any, observe: Any, found: torch.Tensor) -> Any:
        nonlocal micro_batches
        micro_batches += 1
        if due("signal") and micro_batches == fault.micro_batch:
            happen()
            os.kill(os.getpid(), signal.SIGTERM)
        if due("loss") or due("spike"):
            found = found * (float("nan") if fault.what == "loss" else 50.0)
            happen()
        return losses(batch, observe, found)

    def finalized(self: TrainStep, *arguments: Any, **options: Any) -> None:
        if due("gradient"):
            self.chunks[0].buffers[0].grad_data[3] = float("nan")  # type: ignore[index,union-attr,operator]
            happen()
        finalize(self, *arguments, **options)

    def save(session: Any) -> Any:
        if fault.what == "saving" and dist.get_rank() == fault.rank:
            os.kill(os.getpid(), signal.SIGTERM)
        return saved(session)

    def evaluated(*arguments: Any) -> Any:
        if fault.what == "evaluating" and dist.get_rank() == fault.rank:
            os.kill(os.getpid(), signal.SIGTERM)
        return forward(*arguments)

    saved, forward = setup.save, loop.forward_losses
    with (
        patch.object(setup, "save", save),
        patch.object(loop, "forward_losses", evaluated),
        patch.object(Batches, "at", at),
        patch.object(schedule, "_sum_of_losses", sum_of_losses),
        patch.object(TrainStep, "_finalize", finalized),
    ):
        yield
