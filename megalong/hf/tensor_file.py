"""Open a safetensors file, or say exactly why it cannot be opened.

    8 bytes: N, little-endian | N bytes: JSON, name → dtype, shape, data_offsets | data

The header gives the length of the file. So a truncated file is distinguished from one without read permission, from a
Git LFS pointer and from a web page. A message advises a download only if that would help.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from megalong.errors import UserError
from megalong.runtime.files import why_unreadable

_LONGEST_HEADER = 100_000_000  # bytes, the format's own limit
_OTHER_FORMATS = (  # (first bytes, message)
    (
        b"version https://git-lfs",
        "a Git LFS pointer instead of the weights; run `git lfs pull` there, or download it again",
    ),
    (b"PK\x03\x04", "a zip or a pickle of PyTorch, not a safetensors file; save it with safe_serialization=True"),
    (b"<", "a web page instead of the weights (a login or an error); download it again"),
    (b"GGUF", "a GGUF file, not a safetensors file; use the model's bf16, fp16 or fp32 release"),
)


def open_tensors(path: Path, what: str = "") -> Any:
    """`safe_open` of `path`, on the CPU.

    Args:
        what: put before the path in a message, such as "lora.load: ".

    Raises:
        UserError: it is missing, unreadable, empty, truncated or of another format.
    """
    try:
        fault = _fault(path)
        if fault is None:
            return safe_open(path, framework="pt", device="cpu")
    except OSError as error:
        fault = why_unreadable(path, error)
    except SafetensorError as error:
        fault = f"cannot be read as safetensors ({error}); download it again"
    raise UserError(f"{what}{path}: {fault}")


def _fault(path: Path) -> str | None:
    """What is wrong with the file's length or format; None if nothing."""
    with path.open("rb") as file:
        size, head = os.fstat(file.fileno()).st_size, file.read(64)
        if not size:
            return "empty (0 bytes); download it again"
        for start, message in _OTHER_FORMATS:
            if head.startswith(start):
                return message
        if size < 8:
            return f"truncated: {size} bytes, less than the length field of a header; download it again"
        length = int.from_bytes(head[:8], "little")
        if length > _LONGEST_HEADER or (size > 8 and head[8:9] != b"{"):
            return "not a safetensors file; give the model's *.safetensors, or download it again"
        file.seek(8)
        header = file.read(length)
    if len(header) < length:
        return f"truncated: {size} bytes, but its header alone needs {length + 8}; download it again"
    return _wrong_length(header, size)


def _wrong_length(header: bytes, size: int) -> str | None:
    try:
        tensors = json.loads(header)
        ends = [entry["data_offsets"][1] for name, entry in tensors.items() if name != "__metadata__"]
        expected = 8 + len(header) + max(ends, default=0)
    except (ValueError, KeyError, TypeError, IndexError, AttributeError):
        return "damaged: its header is not a safetensors header; download it again"
    if size == expected:
        return None
    if size < expected:
        return f"truncated: {size} of {expected} bytes; download it again"
    return f"damaged: {size} bytes, but its header describes {expected}; download it again"
