"""Save checkpoints in the background while training continues.

    step 50 done ─▶ copy ─▶ steps 51, 52, 53 …            the thread that trains
                      └───▶ write, checksums, rename      a thread of every rank, over a process group of its own

Training pauses only for the copy. The copy is what gets written, so later steps cannot leak into it. Only one save runs
at a time; the next one waits for it. At the end of a step, ranks agree on whether a save is done, so all of them see a
failure at the same step. The cost is host memory for one copy of what each rank writes.
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
        pause, seconds: how long training paused, and how long the whole save took.
        failure: the error message; None if the checkpoint was published.
    """

    step: int
    path: Path
    pause: float
    seconds: float = 0.0
    failure: str | None = None


class Saver:
    """Writes the checkpoints of the run folder `run`, and removes those that `settings` does not keep.

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
        """Start saving `meta.step`. Returns the result of the previous save if it was still running.

        Raises:
            UserError: the previous save, or a synchronous one now, failed, and `on_save_failure` is stop.
        """
        previous = self.finish()
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
                target=self._complete_in_background, args=(begun, started, device), daemon=True, name="saver"
            )
            result.pause = time.perf_counter() - started
            self._thread.start()
            return previous
        if begun is not None:
            self._complete(begun, started)
        result.pause = time.perf_counter() - started
        return previous

    def poll(self) -> Saved | None:
        """Return the result of the running save if it is done on every rank, else None.

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
        """Wait for the running save and return its result; None if no save is running.

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

    def _complete_in_background(self, begun: Begun, started: float, device: torch.device) -> None:
        # torch's writer uses the current GPU's stream.
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
            self._bug = error  # `finish` raises it on the training thread
        self._result.seconds = time.perf_counter() - started


def set_aside(checkpoint: Path) -> None:
    """Rename a damaged checkpoint, so that no run resumes from it and `keep_last` does not count it."""
    target = checkpoint.with_name(checkpoint.name + ".damaged")
    shutil.rmtree(target, ignore_errors=True)
    try:
        checkpoint.rename(target)
    except OSError as error:
        raise UserError(
            f"{checkpoint} is damaged and cannot be renamed ({error.strerror}); delete it to use the step before it"
        ) from None
