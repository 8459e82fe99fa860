"""Read tokens through NVIDIA DALI, whose processes read ahead of the step.

    samples of micro-batch i ──▶ Reader in `workers` processes ──▶ external_source, `depth` batches queued ──▶ copied

DALI itself does not use the GPU: its pipeline reuses a buffer as soon as the next batch is requested, and a GPU copy
that is still queued then would read the next batch's tokens. Batches go to the GPU as in the other loader, from pinned
memory of their own.

DALI passes the reader a number and gets bytes. The reader is a function of that number, so the position in the data is
the same as without DALI: the number of consumed samples. DALI's own checkpoint would hold the same information, but a
run could then not continue without DALI.

The processes are spawned, never forked: a forked one would inherit a CUDA context that it must not touch. They open the
data themselves. Token types that torch supports only partly (uint16) are passed as bytes.

Only this file imports nvidia.dali, and only when a loader is made: it is optional (`pip install megalong[dali]`).
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np

from megalong.batches.order import SampleOrder
from megalong.data.samples.sample import SampleSource
from megalong.errors import UserError
from megalong.runtime.signals import sigint_blocked_for_children

if TYPE_CHECKING:
    import torch

ReadOne = Callable[[SampleSource, int], np.ndarray]


def check_installed() -> None:
    """Refuse `data.loader: dali` if DALI is missing.

    Raises:
        UserError: DALI is not installed.
    """
    if importlib.util.find_spec("nvidia") is None or importlib.util.find_spec("nvidia.dali") is None:
        raise UserError(
            "data.loader: dali needs the package nvidia-dali, which is not installed; pip install megalong[dali], or "
            "write data.loader: torch, which reads the same samples in the same order"
        )


class Reader:
    """Runs in DALI's processes and returns the bytes of one sample.

    Args:
        open_source: opens the samples; called once in each process.
        read: reads sample k; both functions must be picklable.
        order: which samples make up which batch.
    """

    def __init__(self, open_source: Callable[[], SampleSource], read: ReadOne, order: SampleOrder) -> None:
        self._open, self._read, self._order = open_source, read, order
        self._source: SampleSource | None = None

    def __call__(self, info: Any) -> np.ndarray:
        """The bytes that `read` returns for the sample that DALI requests: uint8."""
        if self._source is None:
            self._source = self._open()
        sample = self._order.samples(info.iteration)[info.idx_in_batch]
        return self._read(self._source, sample).view(np.uint8)

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_source": None}


class DaliTokens:
    """The tokens that `reader` reads, batch after batch.

    Args:
        batch_size: samples per batch.
        workers: number of reading processes.
        depth: batches read ahead, at least 1.
    """

    def __init__(self, reader: Reader, batch_size: int, workers: int, depth: int) -> None:
        from nvidia.dali import fn, pipeline_def, types

        @pipeline_def
        def tokens() -> Any:
            return fn.external_source(
                source=reader,
                batch=False,
                parallel=True,
                prefetch_queue_depth=depth,
                dtype=types.UINT8,
                ndim=1,
            )

        with sigint_blocked_for_children():  # after Ctrl-C, training finishes its step and needs them
            self._pipeline = tokens(
                batch_size=batch_size,
                num_threads=1,
                device_id=None,
                py_num_workers=workers,
                py_start_method="spawn",
                prefetch_queue_depth=2,
            )
            self._pipeline.build()

    def next(self) -> list[torch.Tensor]:
        """The next batch: uint8, one tensor per sample, each with memory of its own."""
        import torch

        (batch,) = self._pipeline.run()
        return [torch.from_numpy(np.array(batch.at(row))) for row in range(len(batch))]

    def close(self) -> None:
        """End the processes."""
        del self._pipeline
