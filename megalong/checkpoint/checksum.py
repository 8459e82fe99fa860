"""Checksums of a checkpoint's files, so that damage is found before training uses them.

CRC-32 in vector instructions (isal) is faster than any disk and finds every flipped byte. It protects against faults,
not against forgery. `megalong.json` contains the checksums of the other files, `megalong.json.crc32` its own. Nothing
here needs torch.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
from isal.isal_zlib import crc32

# A block stays in a core's cache for the read, the checksum and the copy. Reading directly into the target takes half
# as long again.
_BLOCK = 1 << 20


class ChecksumReader:
    """Reads a file from front to back through a small buffer and computes its checksum.

    Args:
        summed: whether to compute the checksum; then the bytes between requests are read too.
    """

    def __init__(self, path: Path, summed: bool = True) -> None:
        self._file = path.open("rb", buffering=0)
        self._summed = summed
        self._sum = self._passed = 0
        self._buffer = np.empty(_BLOCK, np.uint8)
        if hasattr(os, "posix_fadvise"):
            os.posix_fadvise(self._file.fileno(), 0, 0, os.POSIX_FADV_SEQUENTIAL)  # read further ahead

    def copy_to(self, offset: int, out: np.ndarray) -> None:
        """Fill `out`, uint8 [n], with the bytes from `offset` on; bytes that were read before are read again.

        Raises:
            EOFError: the file is too short.
        """
        while self._summed and self._passed < offset and (size := self._read(self._passed, offset - self._passed)):
            pass
        filled = 0
        while filled < len(out):
            size = self._read(offset + filled, len(out) - filled)
            if size == 0:
                raise EOFError(f"{self._file.name} ends at {offset + filled}")
            out[filled : filled + size] = self._buffer[:size]
            filled += size

    def checksum(self) -> str:
        """CRC-32 of the whole file as 8 hexadecimal digits."""
        while self._read(self._passed, _BLOCK):
            pass
        return f"{self._sum:08x}"

    def _read(self, offset: int, size: int) -> int:
        """Read up to `size` bytes from `offset` on into the buffer. Returns their number, 0 at the end of the file."""
        again = self._passed - offset
        if again > 0:
            size = min(size, again)
        block = self._buffer[: min(size, _BLOCK)].data
        size = os.preadv(self._file.fileno(), [block], offset)
        if self._summed and again == 0:
            self._sum = crc32(block[:size], self._sum)
            self._passed += size
        return size

    def __enter__(self) -> ChecksumReader:
        return self

    def __exit__(self, *_: Any) -> None:
        self._file.close()


def checksum(path: Path) -> str:
    """CRC-32 of a file as 8 hexadecimal digits."""
    with ChecksumReader(path) as reader:
        return reader.checksum()


def covered(checkpoint: Path, exclude: Iterable[str]) -> list[str]:
    """Every file below `checkpoint` except `exclude`, as relative names, sorted."""
    files = (path.relative_to(checkpoint).as_posix() for path in checkpoint.rglob("*") if path.is_file())
    return sorted(set(files) - set(exclude))


def damages(checkpoint: Path, wanted: dict[str, str]) -> list[str]:
    """What is wrong with the files in `wanted` (name → checksum), one phrase each; empty if they are as written."""
    found: list[str] = []
    for name, value in wanted.items():
        try:
            found += mismatch(name, value, checksum(checkpoint / name))
        except FileNotFoundError:
            found.append(f"{name} is missing")
        except OSError as error:
            found.append(f"{name} cannot be read ({error.strerror})")
    return found


def mismatch(name: str, wanted: str, found: str) -> list[str]:
    """A phrase if a file's checksum is not the wanted one; else empty."""
    return [f"{name} has checksum {found} instead of {wanted}"] if found != wanted else []
