"""Checkpoints are data: one that would run code is refused before anything is loaded.

A Megatron-Core checkpoint contains pickles in three places: `.metadata`, which torch reads with a plain unpickler;
objects between the tensors of `*.distcp` (random states, param groups), which torch loads with `weights_only=False`;
and `common.pt`. A pickle names each class and function that loading it calls. Those in `.metadata` are compared with a
list of what real checkpoints contain; the error names the first that is not in it. Objects and `common.pt` are compared
with torch's own list, by loading them with `weights_only`.

Checksums do not help here: whoever plants a pickle can also write its checksum.
"""

from __future__ import annotations

import io
import pickle
from pathlib import Path
from typing import Any

import torch

from megalong.errors import UserError

METADATA = ".metadata"
_CHECKPOINT = "torch.distributed.checkpoint"
# What torch writes into .metadata, besides types of tensors.
_ALLOWED = {
    ("builtins", "set"),
    ("collections", "OrderedDict"),
    ("pathlib", "PosixPath"),
    ("pathlib._local", "PosixPath"),
    ("torch", "Size"),
    ("torch.serialization", "_get_layout"),
    (f"{_CHECKPOINT}.filesystem", "_StorageInfo"),
    *(
        (f"{_CHECKPOINT}.metadata", name)
        for name in (
            "BytesStorageMetadata",
            "ChunkStorageMetadata",
            "Metadata",
            "MetadataIndex",
            "StorageMeta",
            "TensorProperties",
            "TensorStorageMetadata",
            "_MEM_FORMAT_ENCODING",
        )
    ),
}


def refusal(checkpoint: Path, part: int = 0, parts: int = 1) -> str | None:
    """Why `checkpoint` is refused, with file and function; None if it contains only data.

    Args:
        part, parts: read only this share of its objects, counted from 0; every share reads `.metadata`.
    """
    try:
        metadata = _read_metadata(checkpoint / METADATA)
        objects = _objects(metadata, checkpoint)[part::parts]
        for name, blob in objects:
            _refuse_code(blob, name)
        for file in sorted(checkpoint.glob("*.pt")) if part == 0 else ():
            _refuse_code(file.read_bytes(), file.name)
    except _CodeError as error:
        return f"{checkpoint} is refused: {error}; a checkpoint must contain only data, and loading this would run code"
    return None


class _CodeError(Exception):
    """A file names a class or function that is not allowed."""


class _Metadata(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) in _ALLOWED or (module == "torch" and isinstance(getattr(torch, name, None), torch.dtype)):
            return super().find_class(module, name)
        raise _CodeError(f"{METADATA} names {module}.{name}")


def _read_metadata(path: Path) -> Any:
    try:
        return _Metadata(io.BytesIO(path.read_bytes())).load()
    except (_CodeError, MemoryError):
        raise
    except Exception as error:  # a pickle can be broken in any way
        raise UserError(f"{path} is damaged ({type(error).__name__}); copy the checkpoint again") from None


def _objects(metadata: Any, checkpoint: Path) -> list[tuple[str, bytes]]:
    """(location, bytes) of every object that is stored as a pickle beside the tensors."""
    pickled = {
        name for name, kind in metadata.state_dict_metadata.items() if type(kind).__name__ == "BytesStorageMetadata"
    }
    found = []
    for index, place in metadata.storage_data.items():
        if Path(place.relative_path).name != place.relative_path or getattr(place, "transform_descriptors", None):
            raise _CodeError(f"{METADATA} says {index.fqn} is in {place.relative_path}, in a form that needs code")
        if index.fqn in pickled:
            with (checkpoint / place.relative_path).open("rb") as file:
                file.seek(place.offset)
                found.append((f"{index.fqn} in {place.relative_path}", file.read(place.length)))
    return found


def _refuse_code(blob: bytes, name: str) -> None:
    try:
        torch.load(io.BytesIO(blob), map_location="cpu", weights_only=True)
    except pickle.UnpicklingError:
        try:
            named = torch.serialization.get_unsafe_globals_in_checkpoint(io.BytesIO(blob))
        except Exception:  # a format that torch cannot inspect
            named = []
        raise _CodeError(f"{name} names {', '.join(sorted(named)) or 'what torch does not accept as data'}") from None
