"""Compressed files, read as a stream and never without a bound."""

from __future__ import annotations

import bz2
import gzip
import lzma
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, cast

from mnistm_dist.errors import UserError

MAX_EXPANSION = 100
"""How many times its own size a compressed file may unpack to; a set of images unpacks to less than 10 times."""
_SPARE_BYTES = 64 << 20


class Unpacked:
    """The decompressed bytes of a file, counted, and refused where they grow beyond every set of images."""

    def __init__(self, path: Path, stream: IO[bytes]) -> None:
        self.count = 0
        self._path = path
        self._stream = stream
        self._limit = path.stat().st_size * MAX_EXPANSION + _SPARE_BYTES

    def read(self, size: int = -1) -> bytes:
        """At most `size` bytes, all that are left if negative. Raises UserError past the bound."""
        return self._counted(self._stream.read(self._allowed(size)))

    def readline(self, size: int = -1) -> bytes:
        """At most `size` bytes, up to the end of a line. Raises UserError past the bound."""
        return self._counted(self._stream.readline(self._allowed(size)))

    def _allowed(self, size: int) -> int:
        left = self._limit - self.count + 1
        return left if size < 0 else min(size, left)

    def _counted(self, data: bytes) -> bytes:
        self.count += len(data)
        if self.count > self._limit:
            raise UserError(f"{self._path}: unpacks to more than {MAX_EXPANSION} times its size; refused")
        return data


@contextmanager
def unpack(path: Path) -> Iterator[Unpacked]:
    """Opens a file for reading its bytes, decompressed if it is gzip, bzip2 or xz (told by its first bytes).

    What is cut short, damaged or cannot be read raises UserError, within the block too.
    """
    try:
        with _open(path) as stream:
            yield Unpacked(path, stream)
    except (EOFError, OSError, zlib.error, lzma.LZMAError) as error:
        raise UserError(f"{path}: cut short or damaged ({error}); fetch it again") from error


def _open(path: Path) -> IO[bytes]:
    with path.open("rb") as file:
        magic = file.read(6)
    if magic.startswith(b"\x1f\x8b"):
        return cast(IO[bytes], gzip.open(path, "rb"))
    if magic.startswith(b"BZh"):
        return bz2.open(path, "rb")
    if magic == b"\xfd7zXZ\0":
        return lzma.open(path, "rb")
    return path.open("rb")


def check_expansion(origin: str, packed: int, unpacked: int) -> None:
    """Raises UserError where `packed` bytes promise to unpack to more than any set of images does."""
    if unpacked > packed * MAX_EXPANSION + _SPARE_BYTES:
        raise UserError(f"{origin}: unpacks to more than {MAX_EXPANSION} times its size; refused")
