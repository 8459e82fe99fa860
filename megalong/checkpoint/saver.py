"""Saving while training goes on.

    step 50 done ─▶ copy ─▶ steps 51, 52, 53 …            the thread that trains
                      └───▶ write, checksums, rename      a thread of every rank, over a process group of its own

Training pauses for the copy alone. What is written is the copy, so a later step can't be seen in it. One save is
under way at a time: one that comes before the last is done waits for it. That a save is done is agreed between ranks at
the end of a step, so that all of them hear of a failure at the same step. The price is host memory for the copy: what
this rank writes, once.
"""

from __future__ import annotations

import logging
import shutil
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state

from megalong.checkpoint import folder, store
from megalong.checkpoint.strategy import DeferredSave, Staging
from megalong.checkpoint.writing import Begun, SaveError, complete
from megalong.config.sections import Checkpoint
from megalong.errors import UserError
from megalong.runtime.distributed import background_group, control_group, is_main_rank
from megalong.runtime.gpus import use

log = logging.getLogger("megalong")


@dataclass
class Saved:
    """How a save ended.

    Attributes:
        pause, seconds: how long training paused for it, and how long it took in all.
        failure: what the disk said, None where it is published.
    """

    step: int
    path: Path
    pause: float
    seconds: float = 0.0
    failure: str | None = None


class Saver:
    """Writes the checkpoints of the run folder `run`, and removes those that need not be kept.

    Every method is collective: all ranks call it at the same step.
    """

    def __init__(self, run: Path, settings: Checkpoint, timeout_minutes: float = 60) -> None:
        self._run, self._settings = run, settings
        replicas = parallel_state.get_data_parallel_group(with_context_parallel=True)
        self._strategy = DeferredSave(Staging() if settings.async_save else None, replicas)
        self._group = background_group(timeout_minutes) if settings.async_save else None
        self._thread: threading.Thread | None = None
        self._result: Saved | None = None
        self._bug: BaseException | None = None

    def save(
        self,
        chunks: list[torch.nn.Module],
        optimizer: Any,
        scheduler: Any,
        meta: folder.Meta,
        assets: Path | None = None,
    ) -> Saved | None:
        """Begin a checkpoint of `meta.step`; how the save before ended, if it was still under way.

        Raises:
            UserError: that one failed, or this one where saves are not asynchronous, and `on_save_failure` is stop.
        """
        before = self.finish()
        started = time.perf_counter()
        path = folder.step_folder(self._run, meta.step)
        result = Saved(meta.step, path, 0.0)
        begun: Begun | None = None
        try:
            begun = store.begin_training(path, chunks, optimizer, scheduler, meta, assets, self._strategy)
        except SaveError as error:
            result.failure = str(error)
        self._result = result
        if begun is not None and self._settings.async_save:
            device = next(chunks[0].parameters()).device
            self._thread = threading.Thread(
                target=self._complete_aside, args=(begun, started, device), daemon=True, name="saver"
            )
            result.pause = time.perf_counter() - started
            self._thread.start()
            return before
        if begun is not None:
            self._complete(begun, started)
        result.pause = time.perf_counter() - started
        return before

    def poll(self) -> Saved | None:
        """How the save under way ended, once it has on every rank; None before.

        Raises:
            UserError: it failed and `checkpoint.on_save_failure` is stop.
        """
        if self._result is None:
            return None
        running = self._thread is not None and self._thread.is_alive()
        flag = torch.tensor([float(running)])
        dist.all_reduce(flag, dist.ReduceOp.MAX, control_group())
        return None if flag.item() else self.finish()

    def finish(self) -> Saved | None:
        """Wait for the save under way; how it ended, None where there is none.

        Raises:
            UserError: it failed and `checkpoint.on_save_failure` is stop.
        """
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        bug, self._bug = self._bug, None
        if bug is not None:
            raise bug
        result, self._result = self._result, None
        if result is not None and result.failure is not None:
            if self._settings.on_save_failure == "stop":
                raise UserError(result.failure)
            if is_main_rank():
                log.warning("%s (checkpoint.on_save_failure: continue)", result.failure)
        return result

    def _complete_aside(self, begun: Begun, started: float, device: torch.device) -> None:
        # torch's writer asks for the current GPU's stream.
        use(device)
        self._complete(begun, started)

    def _complete(self, begun: Begun, started: float) -> None:
        assert self._result is not None
        try:
            complete(begun, self._group)
            if is_main_rank():
                folder.remove_old(self._run, self._settings.keep_last, self._settings.keep_every)
        except SaveError as error:
            self._result.failure = str(error)
        except BaseException as error:
            if self._thread is None:
                raise
            self._bug = error  # raised where training waits for it
        self._result.seconds = time.perf_counter() - started


def set_aside(checkpoint: Path) -> None:
    """Give a damaged checkpoint another name, so that it is neither resumed from nor counted among those to keep."""
    target = checkpoint.with_name(checkpoint.name + ".damaged")
    shutil.rmtree(target, ignore_errors=True)
    try:
        checkpoint.rename(target)
    except OSError as error:
        raise UserError(
            f"{checkpoint} is damaged and cannot be renamed ({error.strerror}); delete it to use the step before it"
        ) from None
