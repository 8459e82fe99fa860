"""What Megatron-Core would write of a state, kept until it is written, here or in another thread.

Megatron-Core's own strategy hands shards to child processes through a queue server, even for a blocking save. That
costs a second or more per save and cannot run inside a daemon process; and its asynchronous writer does not copy
tensors that lie in host memory, so that it may see a later step's values. Here Megatron-Core says what is to be
written and gets no further:

    state ─▶ Megatron-Core: which shards are this rank's ─▶ copied aside (`Staging`) ─▶ `write`, any time later

What several ranks hold alike is dealt out among them by Megatron-Core, so that all write about as much. Each rank
writes its one file with torch's file writer, synced to disk; the format on disk is Megatron-Core's, and its loader
reads it.
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

    It is kept from save to save: to get fresh pages from the system takes longer than the copy. Pinned where tensors
    come from a GPU, so that they come at the bus's speed.
    """

    def __init__(self) -> None:
        self._buffers: dict[tuple[str, int], torch.Tensor] = {}

    def take(self, shards: dict[str, list[Any]]) -> None:
        """Let every sharded tensor refer to a copy of its data as it is now."""
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
    else:  # memcpy, which writes past the caches: training waits for little else, and torch takes half as long again
        np.copyto(_bytes(out), _bytes(source))


def _bytes(tensor: torch.Tensor) -> np.ndarray:
    return tensor.reshape(-1).view(torch.uint8).numpy()


class DeferredSave(torch_dist.TorchDistSaveShardedStrategy):
    """Megatron-Core's `torch_dist` format, written by `write` instead of at once; for one save after the other.

    Args:
        staging: where tensors are copied to; None leaves them where they are, for a caller that waits for `write`.
        replicas: ranks that hold tensors alike and share the writing of them; None: the first of them writes them. All
            saves must be of the same tensors then: who writes what is settled in the first.

    Attributes:
        checked: whether a save has been through that found each part of each tensor with exactly one writer.
    """

    def __init__(self, staging: Staging | None = None, replicas: dist.ProcessGroup | None = None) -> None:
        super().__init__(*checkpoint_strategy_arguments(torch_dist.TorchDistSaveShardedStrategy))
        self.checked = False
        self._staging = staging
        self._state: dict[str, Any] = {}
        self._dealing = None
        if replicas is not None and replicas.size() > 1:
            self._dealing = FullyParallelSaveStrategyWrapper(self, replicas, do_cache_distribution=True)

    def save(self, sharded_state_dict: dict[str, Any], checkpoint_dir: str | Path) -> None:
        """Keep what is this rank's to write."""
        if self._dealing is not None:
            self._dealing.apply_saving_parallelization(sharded_state_dict)
        grouped, _, _ = torch_dist._replace_state_dict_keys_with_sharded_keys(sharded_state_dict, True)
        if self._staging is not None:
            self._staging.take(grouped)
        self._state = torch_dist.mcore_to_pyt_state_dict(grouped, False)
        self.checked = True

    def write(self, folder: Path, group: dist.ProcessGroup | None) -> dict[str, str]:
        """Write them into `folder`; collective over `group`, the world's ranks (None: the world's own group).

        Returns:
            The checksums of this rank's files of tensors.
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
    """Writes as torch does, taking checksums on the way: a file need not be read again for its own."""

    def __init__(self) -> None:
        self.checksums: dict[str, str] = {}

    @contextlib.contextmanager
    def create_stream(self, path: str | os.PathLike[str], mode: str) -> Iterator[Any]:
        """A file of tensors as one that adds up what is written to it; any other as torch opens it."""
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
        """Bytes so far."""
        return int(self._raw.tell())

    def flush(self) -> None:
        """Hand what is buffered to the system."""
        if not self._raw.closed:
            self._raw.flush()

    def fileno(self) -> int:
        """The file's descriptor, for `fsync`, once nothing is buffered any more."""
        self._raw.flush()
        return int(self._raw.fileno())

    def writable(self) -> bool:
        """That it is."""
        return True
