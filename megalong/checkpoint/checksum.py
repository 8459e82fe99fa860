"""Checksums of a checkpoint's files, so that damage is found before anything in them is read.

CRC-32 runs at about the speed of a disk and finds every flipped byte; it guards against faults, not against forgery.
`megalong.json` holds the other files' checksums, and `megalong.json.crc32` holds its own. Nothing here needs torch.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterable
from pathlib import Path

# Large enough that calls cost nothing, small enough for any memory.
_CHUNK = 1 << 22


def checksum(path: Path) -> str:
    """CRC-32 of a file as 8 hexadecimal digits."""
    value = 0
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK):
            value = zlib.crc32(chunk, value)
    return f"{value:08x}"


def covered(checkpoint: Path, but: Iterable[str]) -> list[str]:
    """Every file below `checkpoint` but those named, as relative names in one order on every rank."""
    files = (path.relative_to(checkpoint).as_posix() for path in checkpoint.rglob("*") if path.is_file())
    return sorted(set(files) - set(but))


def damages(checkpoint: Path, wanted: dict[str, str]) -> list[str]:
    """What is wrong with the files in `wanted` (name → checksum), one phrase each; empty where they are as written."""
    told = []
    for name, value in wanted.items():
        try:
            found = checksum(checkpoint / name)
        except FileNotFoundError:
            told.append(f"{name} is missing")
        except OSError as error:
            told.append(f"{name} cannot be read ({error.strerror})")
        else:
            if found != value:
                told.append(f"{name} has checksum {found} instead of {value}")
    return told
