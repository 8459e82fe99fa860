"""Checksums of a checkpoint's files, so that damage is found before anything in them is trained on.

CRC-32 in vector instructions (isal) runs faster than any disk and finds every flipped byte; it guards against faults,
not against forgery. `megalong.json` holds the other files' checksums, and `megalong.json.crc32` holds its own. Nothing
here needs torch.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
from isal.isal_zlib import crc32

# Stays in a core's cache from the read to the sum and to the copy: straight to where they belong, bytes would take
# half as long again.
_BLOCK = 1 << 20


class ChecksumReader:
    """A file that is read from front to back through a small buffer, with the sum of all that has passed.

    Args:
        summed: whether bytes between those asked for are read too, for the sum.
    """

    def __init__(self, path: Path, summed: bool = True) -> None:
        self._file = path.open("rb", buffering=0)
        self._summed = summed
        self._sum = self._passed = 0
        self._buffer = np.empty(_BLOCK, np.uint8)
        if hasattr(os, "posix_fadvise"):
            os.posix_fadvise(self._file.fileno(), 0, 0, os.POSIX_FADV_SEQUENTIAL)  # read further ahead

    def copy_to(self, offset: int, out: np.ndarray) -> None:
        """Fill `out`, uint8 [n], with the bytes from `offset` on; what has passed is read again.

        Raises:
            EOFError: the file ends before.
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
        """Read up to `size` bytes from `offset` on into the buffer; how many, 0 at the end of the file."""
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


def covered(checkpoint: Path, but: Iterable[str]) -> list[str]:
    """Every file below `checkpoint` but those named, as relative names in one order on every rank."""
    files = (path.relative_to(checkpoint).as_posix() for path in checkpoint.rglob("*") if path.is_file())
    return sorted(set(files) - set(but))


def damages(checkpoint: Path, wanted: dict[str, str]) -> list[str]:
    """What is wrong with the files in `wanted` (name → checksum), one phrase each; empty where they are as written."""
    told: list[str] = []
    for name, value in wanted.items():
        try:
            told += compared(name, value, checksum(checkpoint / name))
        except FileNotFoundError:
            told.append(f"{name} is missing")
        except OSError as error:
            told.append(f"{name} cannot be read ({error.strerror})")
    return told


def compared(name: str, wanted: str, found: str) -> list[str]:
    """What a file's checksum says of it, in a phrase; empty where it is as written."""
    return [f"{name} has checksum {found} instead of {wanted}"] if found != wanted else []
