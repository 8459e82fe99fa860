"""Finished parts on disk, so that a killed run can continue and memory does not grow with the corpus.

A worker writes its result for part 17 to files in the folder `P.parts`, and then their description:

    000017.0.bin  000017.0.lengths      tokens and document lengths of the first key; .1. of the second …
    000017.unread                       unused keys of its records (keys.py); often absent
    000017.rejected                     bad records and contaminated documents, one JSON object a line; often absent
    000017.json                         fingerprint, counts, size and CRC-32 of each file; written last and atomically

A part counts as finished if its description has the fingerprint of the work (corpus files with sizes and times,
tokenizer, settings) and every file has the recorded size and checksum. After a kill, a power cut that lost half a file,
or a change of a corpus file, exactly the affected parts are made again.
"""

import contextlib
import fcntl
import json
import os
import shutil
import time
import zlib
from collections.abc import Collection
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType
from typing import IO, Any, Self

from megalong.data.indexed_writer import writing
from megalong.errors import UserError
from megalong.runtime.folders import file_aside

BLOCK = 1 << 20
REJECTED, UNREAD = KEPT = ("rejected", "unread")
LOCK_SECONDS = 3.0


@dataclass(frozen=True)
class Finished:
    """The description of a finished part: `files` maps an ending to [size, CRC-32], `counts` a name to a number."""

    number: int
    fingerprint: str
    counts: dict[str, int]
    files: dict[str, list[int]]


class PartFolder:
    """The folder of finished parts, locked by one run at a time.

    Raises:
        UserError: it cannot be created, or another run has locked it.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            path.mkdir(parents=True, exist_ok=True)
            self._lock = os.open(path / "lock", os.O_RDWR | os.O_CREAT, 0o666)
        except OSError as error:
            raise UserError(
                f"{path.parent}: cannot be written to ({error.strerror}); give another output prefix"
            ) from None
        # Workers of a run that was just killed keep the lock until they notice.
        deadline = time.monotonic() + LOCK_SECONDS
        while not self._locked():
            if time.monotonic() > deadline:
                raise UserError(
                    f"--output-prefix: another run is writing to {path}; wait for it, or give another prefix"
                )
            time.sleep(LOCK_SECONDS / 100)

    def file(self, number: int, ending: str) -> Path:
        """Path of the file `ending` of part `number`."""
        return self.path / f"{number:06d}.{ending}"

    def finished(self, number: int, fingerprint: str) -> Finished | None:
        """The finished part `number`, if it has this fingerprint and is undamaged."""
        try:
            found = Finished(**json.loads(self.file(number, "json").read_bytes()))
        except (OSError, ValueError, TypeError):
            return None
        if found.fingerprint != fingerprint:
            return None
        files = found.files.items()
        undamaged = all(_checked(self.file(number, ending)) == expected for ending, expected in files)
        return found if undamaged else None

    def finished_count(self) -> int:
        """Parts that have a description."""
        return len(list(self.path.glob("[0-9]*.json")))

    def discard(self, number: int) -> None:
        """Delete all files that an earlier run left of part `number`."""
        for path in self.path.glob(f"{number:06d}.*"):
            path.unlink(missing_ok=True)

    def discard_all_but(self, numbers: Collection[int]) -> None:
        """Delete the files that an earlier run left of all other parts."""
        for path in self.path.glob("[0-9]*.*"):
            if int(path.name.partition(".")[0]) not in numbers:
                path.unlink(missing_ok=True)

    def remove(self, part: Finished) -> None:
        """Delete the files of an appended part; those of `KEPT` stay until the end."""
        for ending in ("json", *part.files):
            if ending not in KEPT:
                self.file(part.number, ending).unlink(missing_ok=True)

    def clear(self) -> None:
        """Delete the folder with its contents."""
        shutil.rmtree(self.path, ignore_errors=True)
        self.release()

    def release(self) -> None:
        """Release the lock."""
        if self._lock >= 0:
            os.close(self._lock)
        self._lock = -1

    def _locked(self) -> bool:
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        return True


class PartWriter:
    """Writes the files of one part. A context manager; the part counts as finished only after `finish`."""

    def __init__(self, folder: PartFolder, number: int) -> None:
        self._folder, self._number = folder, number
        self._open: dict[str, IO[bytes]] = {}
        self._files: dict[str, list[int]] = {}
        folder.discard(number)

    def write(self, ending: str, data: bytes | memoryview) -> None:
        """Append `data` to the file `ending`.

        Raises:
            UserError: the disk is full.
        """
        with writing(self._folder.path):
            if ending not in self._open:
                self._open[ending] = self._folder.file(self._number, ending).open("wb", buffering=BLOCK)
                self._files[ending] = [0, 0]
            self._open[ending].write(data)
        size, checksum = self._files[ending]
        self._files[ending] = [size + memoryview(data).nbytes, zlib.crc32(data, checksum)]

    def finish(self, fingerprint: str, counts: dict[str, int]) -> Finished:
        """Write the part's description, which makes it a finished part."""
        done = Finished(self._number, fingerprint, counts, self._files)
        with writing(self._folder.path):
            for file in self._open.values():
                file.close()
            with file_aside(self._folder.file(self._number, "json")) as aside:
                aside.write_text(json.dumps(asdict(done)))
        return done

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for file in self._open.values():
            with contextlib.suppress(OSError):
                file.close()


def _checked(path: Path) -> list[int] | None:
    """[size, CRC-32] of a file, None if it does not exist."""
    size = checksum = 0
    try:
        with path.open("rb") as file:
            while block := file.read(BLOCK):
                size, checksum = size + len(block), zlib.crc32(block, checksum)
    except OSError:
        return None
    return [size, checksum]


def canonical(value: Any) -> str:
    """JSON with sorted keys, so that equal values give equal text."""
    return json.dumps(value, sort_keys=True, default=str)
