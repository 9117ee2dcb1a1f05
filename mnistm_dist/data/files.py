"""A file written once from front to back, hashed on its way, whose failures are told in one line."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType

from mnistm_dist.errors import UserError, os_error_reason

_FLUSH_AT = 1 << 20


@contextlib.contextmanager
def saying_what_fails(path: Path) -> Iterator[None]:
    """Turns an `OSError` of writing ``path`` into a `UserError` of one line."""
    try:
        yield
    except OSError as error:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        advice = "free some space, or choose another place" if full else "choose another place"
        raise UserError(f"{path}: cannot be written ({os_error_reason(error)}): {advice}") from error


def sync(path: Path) -> None:
    """Makes the kernel write a file, or the names in a folder, to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


class OutputFile:
    """A new file: a context manager at whose good end it is whole, its ``size`` and ``sha256`` known.

    What `sync` does is left to the caller, for many files at once. Raises `UserError` where it cannot be written.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._digest = hashlib.sha256()
        self._buffer = bytearray()
        self.size = 0
        """Bytes so far."""
        with saying_what_fails(path):
            self._file = path.open("x+b", buffering=0)

    @property
    def sha256(self) -> str:
        """Of all bytes that were flushed."""
        return self._digest.hexdigest()

    def append(self, data: bytes) -> int:
        """Adds bytes at the end; returns the offset at which they start."""
        offset = self.size
        self.size += len(data)
        self._buffer += data
        if len(self._buffer) >= _FLUSH_AT:
            self.flush()
        return offset

    def flush(self) -> None:
        """Hands what is buffered to the kernel, so that `read` finds it."""
        self._digest.update(self._buffer)
        rest = memoryview(self._buffer)
        with saying_what_fails(self._path):
            while rest:
                rest = rest[self._file.write(rest) :]
        self._buffer = bytearray()

    def read(self, size: int, offset: int) -> bytes:
        """Bytes that were flushed, from ``offset`` on."""
        return os.pread(self._file.fileno(), size, offset)

    def __enter__(self) -> OutputFile:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if error is None:
                self.flush()
        finally:
            self._file.close()
