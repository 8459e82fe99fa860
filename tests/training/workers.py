"""What a rank of the worker pool runs in the training tests."""

from __future__ import annotations

import contextlib
import io
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import torch

from megalong.config.schema import Config
from megalong.runtime import distributed


def train_steps(settings: dict[str, Any], steps: int, device: str = "cpu") -> dict[str, list[float]]:
    """Loss and gradient norm of the first `steps` steps, without saving anything."""
    with _session(settings, device) as session:
        from megalong.batches.loader import Batches
        from megalong.data.samples.sampler import PackedSamples
        from megalong.training.step import TrainStep

        config = session.config
        data = config.data
        samples = PackedSamples(
            data.mixture, data.seq_length, config.run.seed, data.split, "train", packing=data.packing
        )
        batches = Batches(config, lambda: samples, session.device)
        step = TrainStep(session.chunks, session.optimizer, session.scheduler)
        size = config.training.global_batch_size
        results = [step.run(batches, index * size) for index in range(steps)]
        return {"loss": [r.loss for r in results], "norm": [r.gradient_norm for r in results]}


def train_each(many: list[dict[str, Any]], steps: int) -> list[dict[str, list[float]]]:
    """`train_steps` of one setting after the other, on the same ranks."""
    return [train_steps(settings, steps) for settings in many]


def train_run(settings: dict[str, Any], stop_after: int | None = None) -> dict[str, Any]:
    """Run the trainer, saving and resuming as a user's run does; returns what it logged.

    Args:
        stop_after: end as if killed after this step, whatever it had begun to save by then being saved.
    """
    from megalong.training.loop import Trainer

    with _session(settings) as session:
        records = _Records()
        trainer = Trainer(session, records)  # type: ignore[arg-type]
        started = session.step
        if stop_after is None:
            trainer.run()
        else:
            while session.step < stop_after:
                trainer._one_step()
            session.saver.finish()
        return {"started": started, "records": records.kept}


def train_run_in(folder: str, settings: dict[str, Any], stop_after: int | None = None) -> dict[str, Any]:
    """`train_run`, started in `folder`."""
    with contextlib.chdir(folder):
        return train_run(settings, stop_after)


def train_beside_slow_rank(settings: dict[str, Any], rank: int, seconds: float) -> dict[str, Any] | None:
    """Run the trainer with its log while `rank` takes `seconds` longer to read each step's data; the last health."""
    from megalong.batches.loader import Batches
    from megalong.runtime.logs import close_logging, setup_logging
    from megalong.training import health
    from megalong.training.loop import Trainer

    right = Batches.at

    def slow(self: Batches, consumed_samples: int) -> Any:
        if torch.distributed.get_rank() == rank:
            time.sleep(seconds)
        return right(self, consumed_samples)

    patches = patch.object(Batches, "at", slow), patch.object(health, "LASTING_SECONDS", 0.5)
    with _session(settings) as session, patches[0], patches[1]:
        setup_logging(torch.distributed.get_rank(), Path(settings["run"]["dir"]))
        records = _Records()
        try:
            Trainer(session, records).run()  # type: ignore[arg-type]
        finally:
            close_logging()
        return None if records.last_health is None else dict(vars(records.last_health))


def learning_rates(many: list[dict[str, Any]]) -> list[list[float]]:
    """The rate of every step under each of many configurations, from step 1 on."""
    distributed.start(torch.device("cpu"))
    from megalong.training.optimizer import build_scheduler

    found = []
    for config in map(Config.model_validate, many):
        group: dict[str, Any] = {}
        scheduler = build_scheduler(config, SimpleNamespace(param_groups=[group]))
        rates = []
        for _ in range(config.training.train_iters):
            rates.append(group["lr"])
            scheduler.step(1)
        found.append(rates)
    return found


def largest_move(settings: dict[str, Any]) -> float:
    """How far a whole run moves the weight that it moves farthest."""
    from megalong.training.loop import Trainer

    with _session(settings) as session:
        weights = [weight for chunk in session.chunks for weight in chunk.parameters()]
        before = [weight.detach().clone() for weight in weights]
        Trainer(session, _Records()).run()  # type: ignore[arg-type]
        return max(float((weight - old).abs().max()) for weight, old in zip(weights, before, strict=True))


def start_run(settings: dict[str, Any]) -> None:
    """Set a run up with its log in the run's folder, and leave it."""
    from megalong.runtime.logs import close_logging, setup_logging

    setup_logging(0, Path(settings["run"]["dir"]))
    try:
        with _session(settings):
            pass
    finally:
        close_logging()


class _Records:
    """A sink that keeps what it is given."""

    def __init__(self) -> None:
        self.kept: list[dict[str, Any]] = []
        self.told: list[tuple[int, str, str]] = []
        self.last_health: Any = None

    def step(self, record: Any) -> None:
        self.kept.append(dict(vars(record)))

    def event(self, step: int, kind: str, told: str) -> None:
        self.told.append((step, kind, told))

    def health(self, step: int, health: Any) -> None:
        self.last_health = health

    def flush(self) -> None:
        pass

    def close(self) -> None:
        pass


class _session:
    """A set-up session on the pool's gloo group; the layout is cleared afterwards."""

    def __init__(self, settings: dict[str, Any], device: str = "cpu") -> None:
        self.config = Config.model_validate(settings)
        self.device = torch.device(device)

    def __enter__(self) -> Any:
        distributed.start(self.device)  # before anything imports megatron
        from megalong.training.setup import set_up

        Path(self.config.run.dir).mkdir(parents=True, exist_ok=True)
        return set_up(self.config, self.device)

    def __exit__(self, *exception: object) -> None:
        distributed.clear_grid()


def export_both(run: str, adapter: str, merged: str) -> None:
    """Write a run's adapters, and its weights with them added."""
    from megalong.hf.convert import export_adapter, export_hf

    export_adapter(run, adapter)
    export_hf(run, merged)


def command(words: list[str]) -> tuple[int, str, str]:
    """(exit status, stdout, stderr) of a `megalong` command."""
    from megalong.cli import main

    out, errors = io.StringIO(), io.StringIO()
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(errors):
            status = main(words)
    except SystemExit as end:
        status = int(end.code or 0)
    return status, out.getvalue(), errors.getvalue()


def models_left(many: list[dict[str, Any]]) -> list[int]:
    """How many models this process still holds after each of several runs, once Python has collected its garbage."""
    import gc

    from megalong.model.llama import LlamaModel

    left = []
    for settings in many:
        train_run(settings)
        distributed.free_cycles()
        left.append(sum(type(one) is LlamaModel for one in gc.get_objects()))
    return left
