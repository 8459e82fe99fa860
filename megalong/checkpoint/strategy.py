"""Keep what Megatron-Core would write of a state, and write it later, in this thread or another.

Megatron-Core's own strategy passes shards to child processes through a queue server, even for a blocking save. That
costs a second or more per save and cannot run inside a daemon process. Its asynchronous writer does not copy tensors in
host memory, so it may write a later step's values. Here Megatron-Core only decides what is written:

    state ─▶ Megatron-Core: which shards are this rank's ─▶ copied (`Staging`) ─▶ `write`, any time later

If several ranks hold the same tensors, Megatron-Core distributes them among these ranks, so that all write about the
same amount. Each rank writes one file with torch's file writer, synced to disk. The format on disk is Megatron-Core's,
and its loader reads it.
"""

from __future__ import annotations

import contextlib
import io
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from isal.isal_zlib import crc32
from megatron.core.dist_checkpointing.mapping import ShardedTensor
from megatron.core.dist_checkpointing.strategies import torch as torch_dist
from megatron.core.dist_checkpointing.strategies.fully_parallel import FullyParallelSaveStrategyWrapper
from torch.distributed import checkpoint as torch_checkpoint
from torch.distributed.checkpoint.filesystem import FileSystem

from megalong.runtime.megatron import checkpoint_strategy_arguments


class Staging:
    """Host memory that tensors are copied into before a save writes them.

    Later saves reuse it, because allocating new pages takes longer than the copy. For tensors on a GPU it is pinned, so
    that the copy runs at the speed of the bus.
    """

    def __init__(self) -> None:
        self._buffers: dict[tuple[str, int], torch.Tensor] = {}

    def copy(self, shards: dict[str, list[Any]]) -> None:
        """Replace the data of every sharded tensor by a copy."""
        on_gpu = False
        for key, parts in shards.items():
            for place, part in enumerate(parts):
                if not isinstance(part, ShardedTensor):
                    continue  # objects are serialized at once
                source = part.data.detach()
                buffer = self._buffers.get((key, place))
                if buffer is None or (buffer.shape, buffer.dtype) != (source.shape, source.dtype):
                    buffer = torch.empty(source.shape, dtype=source.dtype, pin_memory=source.is_cuda)
                    self._buffers[key, place] = buffer
                _copy(buffer, source)
                part.data = buffer
                on_gpu |= source.is_cuda
        if on_gpu:
            torch.cuda.synchronize()


def _copy(out: torch.Tensor, source: torch.Tensor) -> None:
    """`out` = `source`, of the same shape and type, without waiting for a GPU."""
    if source.is_cuda or not source.is_contiguous() or not source.numel():
        out.copy_(source, non_blocking=True)
    else:  # memcpy, which bypasses the caches: training waits for this copy, and torch's takes half as long again
        np.copyto(_bytes(out), _bytes(source))


def _bytes(tensor: torch.Tensor) -> np.ndarray:
    return tensor.reshape(-1).view(torch.uint8).numpy()


class DeferredSave(torch_dist.TorchDistSaveShardedStrategy):
    """Megatron-Core's `torch_dist` format, written by `write` instead of at once; one save at a time.

    Args:
        staging: memory that tensors are copied to; None: no copy, for a caller that waits for `write`.
        replicas: ranks that hold the same tensors and share the writing of them; None: the first of them writes them.
            With `replicas`, all saves must be of the same tensors, because the first save decides who writes what.

    Attributes:
        checked: whether an earlier save has verified that each part of each tensor has exactly one writer.
    """

    def __init__(self, staging: Staging | None = None, replicas: dist.ProcessGroup | None = None) -> None:
        super().__init__(*checkpoint_strategy_arguments(torch_dist.TorchDistSaveShardedStrategy))
        self.checked = False
        self._staging = staging
        self._state: dict[str, Any] = {}
        self._fully_parallel = None
        if replicas is not None and replicas.size() > 1:
            self._fully_parallel = FullyParallelSaveStrategyWrapper(self, replicas, do_cache_distribution=True)

    def save(self, sharded_state_dict: dict[str, Any], checkpoint_dir: str | Path) -> None:
        """Keep what this rank must write."""
        if self._fully_parallel is not None:
            self._fully_parallel.apply_saving_parallelization(sharded_state_dict)
        grouped, _, _ = torch_dist._replace_state_dict_keys_with_sharded_keys(sharded_state_dict, True)
        if self._staging is not None:
            self._staging.copy(grouped)
        self._state = torch_dist.mcore_to_pyt_state_dict(grouped, False)
        self.checked = True

    def write(self, folder: Path, group: dist.ProcessGroup | None) -> dict[str, str]:
        """Write the kept shards into `folder`; collective over `group`, the world's ranks (None: the default group).

        Returns:
            The checksums of this rank's tensor files.
        """
        writer = torch_checkpoint.FileSystemWriter(folder, single_file_per_rank=True, sync_files=True)
        writer.fs = files = _SummingFiles()
        torch_checkpoint.save(
            self._state,
            storage_writer=writer,
            planner=torch_dist.MCoreSavePlanner(dedup_replicated_tensors=False, flatten_state_dict=False),
            process_group=group,
        )
        self._state = {}
        return files.checksums


class _SummingFiles(FileSystem):
    """Writes as torch does and computes checksums on the way, so no file is read again for its checksum."""

    def __init__(self) -> None:
        self.checksums: dict[str, str] = {}

    @contextlib.contextmanager
    def create_stream(self, path: str | os.PathLike[str], mode: str) -> Iterator[Any]:
        """Open a tensor file that computes the checksum of what is written; open any other file as torch does."""
        with super().create_stream(path, mode) as raw:
            if mode != "wb" or Path(path).suffix != ".distcp":
                yield raw
                return
            stream = _Summed(raw)
            yield stream
        self.checksums[Path(path).name] = f"{stream.sum:08x}"


class _Summed(io.RawIOBase):
    """A file that is written from front to back, and the CRC-32 of it so far."""

    def __init__(self, raw: io.IOBase) -> None:
        super().__init__()
        self._raw: Any = raw
        self.sum = 0

    def write(self, data: Any) -> int:
        """All of `data`."""
        self.sum = crc32(data, self.sum)
        self._raw.write(data)
        return memoryview(data).nbytes

    def tell(self) -> int:
        """Bytes written so far."""
        return int(self._raw.tell())

    def flush(self) -> None:
        """Flush the buffer to the operating system."""
        if not self._raw.closed:
            self._raw.flush()

    def fileno(self) -> int:
        """The file's descriptor, for `fsync`; flushes the buffer first."""
        self._raw.flush()
        return int(self._raw.fileno())

    def writable(self) -> bool:
        """Always true."""
        return True
