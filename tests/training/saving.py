"""What a rank of the worker pool runs in the tests of saving: a run whose disk or writer is made to misbehave."""

from __future__ import annotations

import errno
import os
import shutil
import threading
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist

from megalong.checkpoint import saver, writing
from megalong.runtime.logs import close_logging, setup_logging


def run(settings: dict[str, Any], how: dict[str, int] | None = None) -> dict[str, Any]:
    """Run the trainer.

    Args:
        how: `stop`: end after this step; `hold`: the first save is written when this many more steps are done;
            `full`: the disk of `rank` takes nothing of this step; `readonly`: no folder can be made for this step;
            `vanish`, `block`: at this step the folder of checkpoints is gone, or a file is in its place.
    """
    from megalong.training.loop import Trainer
    from tests.training.workers import _Records, _session

    how = how or {}
    complete, write = saver.complete, writing.DeferredSave.write
    go, written = threading.Event(), threading.Event()
    events: list[tuple[str, str, str]] = []

    def held(begun: Any, group: Any) -> None:
        step = begun.meta.step
        events.append((threading.current_thread().name, "writes", str(step)))
        checkpoints = begun.checkpoint.parent
        if how.get("hold") == step:
            assert go.wait(60)
        if how.get("vanish") == step:
            shutil.rmtree(checkpoints)
        if how.get("block") == step:
            shutil.rmtree(checkpoints)
            checkpoints.write_text("in the way")
        if how.get("readonly") == step:
            with patch.object(Path, "mkdir", _read_only):
                complete(begun, group)
        else:
            complete(begun, group)
        written.set()

    def full(self: Any, folder: Path, group: Any) -> dict[str, str]:
        if folder.name.startswith(f"step-{how.get('full', 0):08d}") and dist.get_rank() == how["rank"]:
            with patch("os.fsync", _no_space):
                return write(self, folder, group)
        return write(self, folder, group)

    def used(device: torch.device) -> None:
        events.append((threading.current_thread().name, "uses", str(device)))

    with (
        _session(settings) as session,
        patch.object(saver, "use", used),
        patch.object(saver, "complete", held),
        patch.object(writing.DeferredSave, "write", full),
    ):
        setup_logging(dist.get_rank(), Path(settings["run"]["dir"]))
        records = _Records()
        trainer = Trainer(session, records)  # type: ignore[arg-type]
        started, during = session.step, 0
        try:
            if "stop" in how or "hold" in how:
                while session.step < how.get("stop", session.config.training.train_iters):
                    trainer._one_step()
                    if session.step == how.get("hold", 0) + 1:
                        during = int(not written.is_set())
                        go.set()
                session.saver.finish()
            else:
                trainer.run()
        finally:
            close_logging()
        losses = [record["loss"] for record in records.kept]
        return {"started": started, "losses": losses, "steps_while_writing": during, "events": events}


def _read_only(*_: Any, **__: Any) -> None:
    raise OSError(errno.EROFS, os.strerror(errno.EROFS))


def _no_space(descriptor: int) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
