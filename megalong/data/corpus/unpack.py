"""Reads a corpus file as one decompressed stream: plain, gzip or Zstandard.

A stream that is truncated or damaged is an error, never a shorter file. gzip's own reader ensures that. Zstandard's
Python reader silently stops where a file was truncated, so frames are decompressed here one by one.
"""

import gzip
import io
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from typing import IO, Any, cast

from megalong.errors import UserError

BUFFER = 1 << 20
LARGEST_WINDOW = 1 << 31  # as `zstd --long=31` needs; the default refuses more than 128 MB


@contextmanager
def unpacked(path: str, packing: str) -> Iterator[IO[bytes]]:
    """The decompressed content of a file as a stream.

    Raises:
        UserError: the file cannot be opened, or it is damaged.
    """
    try:
        with open(path, "rb") as raw:
            yield _stream(raw, packing)
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise UserError(f"{path}: broken {packing[1:]} stream ({error}); fetch the file again") from None
    except OSError as error:
        raise UserError(f"--input: {path} cannot be read ({error.strerror or error}); check the disk") from None


def _stream(raw: IO[bytes], packing: str) -> IO[bytes]:
    if packing == ".gz":
        return cast(IO[bytes], io.BufferedReader(cast(Any, gzip.GzipFile(fileobj=raw)), BUFFER))
    if packing == ".zst":
        return cast(IO[bytes], io.BufferedReader(_Zstandard(raw), BUFFER))
    return raw


class _Zstandard(io.RawIOBase):
    """All frames of a file, one after the other."""

    def __init__(self, raw: IO[bytes]) -> None:
        import zstandard

        self._raw, self._broken = raw, zstandard.ZstdError
        self._unpacker = zstandard.ZstdDecompressor(max_window_size=LARGEST_WINDOW)
        self._frame: Any = None
        self._packed = self._ready = b""

    def readable(self) -> bool:
        """Always true."""
        return True

    def readinto(self, buffer: Any) -> int:
        """Fill `buffer` with at most one decompressed block; returns its bytes, 0 at the end."""
        while not self._ready and self._more():
            pass
        size = min(len(buffer), len(self._ready))
        buffer[:size], self._ready = self._ready[:size], self._ready[size:]
        return size

    def _more(self) -> bool:
        """Decompress the next block; False at the end of the file."""
        self._packed = self._packed or self._raw.read(BUFFER // 64)
        if not self._packed:
            if self._frame is not None:
                raise EOFError("the file ended inside a frame")
            return False
        if self._frame is None:
            self._frame = self._unpacker.decompressobj()
        try:
            self._ready, self._packed = self._frame.decompress(self._packed), b""
        except self._broken as error:
            raise EOFError(str(error)) from None
        if self._frame.eof:
            self._packed, self._frame = self._frame.unused_data, None
        return True
