"""Read a checkpoint's tensors directly into their destination, and compute checksums on the way.

torch's reader unpickles every tensor into newly allocated memory and then copies it; the allocation alone takes longer
than the read. In the file, each tensor is a small zip archive of torch's that contains its bytes in one piece:

    |..| tensor of layer 3: header, pickle (type, shape), bytes, table of contents |..|
                                                            └──▶ the parameter itself, or a buffer that is reused

An unpickler that accepts only tensors parses the pickle. The bytes are read into the destination tensor if it needs all
of them, else into a buffer (pinned for a GPU) from which a part is copied. torch reads any other format.
"""

from __future__ import annotations

import contextlib
import io
import pickle
import struct
import sys
from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from megatron.core.dist_checkpointing.strategies import torch as torch_dist
from torch.distributed.checkpoint import FileSystemReader
from torch.distributed.checkpoint.planner import LoadItemType, LoadPlan, LoadPlanner, ReadItem
from torch.futures import Future

from megalong.checkpoint.checksum import ChecksumReader
from megalong.checkpoint.verification import Verification

_TYPES = {
    "FloatStorage": torch.float32,
    "BFloat16Storage": torch.bfloat16,
    "HalfStorage": torch.float16,
    "DoubleStorage": torch.float64,
    "LongStorage": torch.int64,
    "IntStorage": torch.int32,
    "ShortStorage": torch.int16,
    "CharStorage": torch.int8,
    "ByteStorage": torch.uint8,
    "BoolStorage": torch.bool,
}
# A record's header in a zip archive: signature, compression method, and the lengths of the name and the padding that
# follow.
_LOCAL = struct.Struct("<4s4xH16x2H")
_HEAD = 4096  # bytes of an archive that hold its pickle and the headers up to the tensor's bytes


@contextlib.contextmanager
def direct_reading(verification: Verification) -> Iterator[None]:
    """Make Megatron-Core read with `DirectReader` in this block; its strategy accepts no reader."""
    given = torch_dist._get_filesystem_reader
    torch_dist._get_filesystem_reader = lambda folder, *_, **__: DirectReader(folder, verification)
    try:
        yield
    finally:
        torch_dist._get_filesystem_reader = given


class DirectReader(FileSystemReader):
    """Reads a checkpoint of torch's or Megatron-Core's as `FileSystemReader` does, without copies in between.

    Args:
        verification: receives the checksums of the files that it wants and that are read.
    """

    def __init__(self, path: str | Path, verification: Verification) -> None:
        super().__init__(path)
        self._verification = verification
        self._metadata: Any = None
        self._aside: tuple[Any, torch.Tensor] = None, torch.empty(0, dtype=torch.uint8)

    def read_metadata(self, *args: Any, **kwargs: Any) -> Any:
        """`.metadata`, read only once."""
        if self._metadata is None:
            self._metadata = super().read_metadata(*args, **kwargs)
        return self._metadata

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Future[None]:
        """Fill everything that `plan` asks for, each file from front to back."""
        left = []
        for name, items in self._by_file(plan).items():
            path, wanted = Path(self.path, name), self._verification.wants(name)
            with ChecksumReader(path, summed=wanted) as reader:
                left += [item for item in items if not self._read(reader, item, planner)]
                if wanted:
                    self._verification.record(name, reader.checksum())
        self._aside = None, self._aside[1][:0]
        return super().read_data(replace(plan, items=left), planner)

    def _by_file(self, plan: LoadPlan) -> dict[str, list[ReadItem]]:
        found: dict[str, list[ReadItem]] = {}
        for item in sorted(plan.items, key=lambda item: self.storage_data[item.storage_index].offset):
            found.setdefault(self.storage_data[item.storage_index].relative_path, []).append(item)
        return found

    def _read(self, reader: ChecksumReader, item: ReadItem, planner: LoadPlanner) -> bool:
        """Read `item` directly. Returns False if torch's reader must read it."""
        place = self.storage_data[item.storage_index]
        if item.type != LoadItemType.TENSOR or place.transform_descriptors:
            return False
        stored = _find(reader, place.offset, place.length)
        if stored is None:
            return False
        target = planner.resolve_tensor(item).detach()
        whole = stored.shape == item.lengths == target.shape
        if whole and target.device.type == "cpu" and target.is_contiguous() and target.dtype == stored.dtype:
            reader.copy_to(stored.offset, target.reshape(-1).view(torch.uint8).numpy())
        else:
            source = self._read_aside(reader, stored, target.is_cuda)
            for dim, (first, length) in enumerate(zip(item.storage_offsets, item.lengths, strict=True)):
                source = source.narrow(dim, first, length)
            if source.shape != target.shape:
                raise ValueError(
                    f"{place.relative_path}: {item.storage_index} is {source.shape}, wanted {target.shape}"
                )
            target.copy_(source)
        planner.commit_tensor(item, target)
        return True

    def _read_aside(self, reader: ChecksumReader, stored: _Stored, pinned: bool) -> torch.Tensor:
        """The stored tensor, in a buffer that the next call overwrites."""
        which, memory = self._aside
        size = stored.shape.numel() * stored.dtype.itemsize
        if len(memory) < size:
            memory = torch.empty(size, dtype=torch.uint8, pin_memory=pinned)
        if which != (reader, stored.offset):  # consecutive items may be parts of one tensor
            reader.copy_to(stored.offset, memory[:size].numpy())
        self._aside = (reader, stored.offset), memory
        return memory[:size].view(stored.dtype).view(stored.shape)


@dataclass(frozen=True)
class _Stored:
    """A tensor in a file: the offset of its bytes, its type and its shape; row-major."""

    offset: int
    dtype: torch.dtype
    shape: torch.Size


def _find(reader: ChecksumReader, offset: int, length: int) -> _Stored | None:
    """The tensor that torch saved to these bytes of a file; None if its format is not recognized.

    The start of the archive is enough: the pickle comes first and is self-terminating, and the tensor's bytes follow
    within their record. (The table of contents is at the end of the archive, which is not read yet.)
    """
    head = np.empty(min(_HEAD, length), np.uint8)
    reader.copy_to(offset, head)
    known = head.tobytes()
    try:
        name, begin = _record(known, 0)
        root = name.removesuffix("data.pkl")
        storage, first, shape, stride, *_ = _Head(io.BytesIO(known[begin:])).load()
        dtype, size = _TYPES[storage[1]], torch.Size(shape)
        _, order = _record(known, _place(known, f"{root}byteorder"))
        _, data = _record(known, _place(known, f"{root}data/{storage[2]}"))
    except (pickle.UnpicklingError, KeyError, ValueError, TypeError, IndexError, struct.error, EOFError):
        return None  # torch reads it, or reports what is wrong
    row_major = not first and tuple(stride) == torch.empty(size, device="meta").stride()
    same_order = known.startswith(sys.byteorder.encode(), order)
    if not (row_major and same_order and data + size.numel() * dtype.itemsize <= length):
        return None
    return _Stored(offset + data, dtype, size)


def _record(archive: bytes, at: int) -> tuple[str, int]:
    """(name, offset of its bytes) of the record of a zip archive whose header is at `at`.

    Raises:
        ValueError: there is no record at `at`, or it is compressed.
    """
    mark, method, name_length, padding = _LOCAL.unpack_from(archive, at)
    if mark != b"PK\3\4" or method:
        raise ValueError
    begin = at + _LOCAL.size
    return archive[begin : begin + name_length].decode(), begin + name_length + padding


def _place(archive: bytes, name: str) -> int:
    """The offset of a record's header.

    Raises:
        ValueError: it is not among these bytes.
    """
    return archive.index(name.encode()) - _LOCAL.size


class _Head(pickle.Unpickler):
    """Unpickles the metadata of one tensor and refuses anything else."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ("torch._utils", "_rebuild_tensor_v2"):
            return lambda *arguments: arguments
        if (module, name) == ("collections", "OrderedDict"):
            return OrderedDict
        if module == "torch" and name in _TYPES:
            return name
        raise pickle.UnpicklingError(f"{module}.{name}")

    def persistent_load(self, pid: Any) -> Any:
        return pid
