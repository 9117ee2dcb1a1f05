"""Files on a disk that may be full, read-only or gone: atomic writes, and an OSError as one line for a person."""

from __future__ import annotations

import contextlib
import errno
import os
from collections.abc import Iterator
from pathlib import Path

from mnistm_dist.errors import UserError, os_error_reason

DISK_FULL = (errno.ENOSPC, errno.EDQUOT)


@contextlib.contextmanager
def explain_os_errors(
    subject: str | Path, *, verb: str = "written", advice: str = "free some space or choose another path"
) -> Iterator[None]:
    """Turn an `OSError` of the block into a `UserError`: ``SUBJECT: cannot be VERB (REASON); ADVICE``."""
    try:
        yield
    except OSError as error:
        raise UserError(f"{subject}: cannot be {verb} ({os_error_reason(error)}); {advice}") from error


def fsync_path(path: Path) -> None:
    """Flush a file, or the names in a folder, to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def atomic_path(path: Path) -> Iterator[Path]:
    """Give a path beside ``path`` to write to, with the same suffix.

    If the block exits without an error, the file is synced and renamed to ``path``; otherwise it is removed. Raises
    `OSError`.
    """
    # One name, so that what a killed writer left behind is overwritten by the next one.
    temporary = path.with_name(f".{path.stem}.tmp{path.suffix}")
    try:
        yield temporary
        fsync_path(temporary)
        temporary.replace(path)
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)


def write_atomic(path: Path, data: bytes | str) -> None:
    """Write a file so that after a crash it is complete or not there. Text is UTF-8. Raises `OSError`."""
    with atomic_path(path) as temporary:
        temporary.write_bytes(data.encode("utf-8", "backslashreplace") if isinstance(data, str) else data)
