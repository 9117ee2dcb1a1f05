"""Files on a disk that may be full, read-only or gone: atomic writes, locks, and an OSError as one line."""

import contextlib
import os
import re
import shutil
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import TypeVar

from mnistm_dist.errors import UserError, os_error_reason

# The first bytes of what Git leaves in place of a large file that it has not fetched (Git LFS, pointer specification).
GIT_LFS_START = b"version https://git-lfs"
# What to do about it: the end of an error message.
GIT_LFS_ADVICE = "a Git LFS pointer in place of the file; fetch it with git lfs pull"
AnyPath = TypeVar("AnyPath", str, Path)


@contextlib.contextmanager
def explain_os_errors(
    subject: str | Path, *, verb: str = "written", advice: str = "free some space or choose another path"
) -> Iterator[None]:
    """Turn an `OSError` of the block into a `UserError`: ``SUBJECT: cannot be VERB (REASON); ADVICE``."""
    try:
        yield
    except OSError as error:
        raise UserError(f"{subject}: cannot be {verb} ({os_error_reason(error)}); {advice}") from error


def refuse_pointer(origin: str, start: bytes) -> None:
    """Raise `UserError` if a file starts as a Git LFS pointer."""
    if start.startswith(GIT_LFS_START):
        raise UserError(f"{origin}: {GIT_LFS_ADVICE}")


def local_path(path: AnyPath) -> AnyPath:
    """Return a path with ``~`` expanded. Raises `UserError` for a URL: it would become a folder of the name ``s3:``."""
    if re.match(r"[A-Za-z][\w+.-]+:/", str(path)):
        raise UserError(f"{path}: should be a local path, not a URL")
    return type(path)(os.path.expanduser(path))  # noqa: PTH111  # Path.expanduser fails without a home


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


@contextlib.contextmanager
def file_lock(path: Path, *, wait: bool = True) -> Iterator[bool]:
    """Hold the lock file ``path`` among all processes. Yield whether it is held, which is always if ``wait``.

    The kernel releases the lock when its holder dies. Removing the file while others wait for it is safe: they notice
    and lock the new one. Raises `OSError` if the file cannot be written or locked.
    """
    from filelock import FileLock, Timeout  # brings asyncio

    lock = FileLock(path, timeout=-1 if wait else 0)
    try:
        lock.acquire()
    except Timeout:
        yield False
        return
    try:
        yield True
    finally:
        lock.release()


class FolderBusy(UserError):
    """Another process is writing the folder."""


def refuse_existing(out: Path) -> None:
    """Raise `UserError` if there is anything at ``out``."""
    if os.path.lexists(out):
        raise UserError(f"{out}: already exists: choose another --out or delete it")


@contextlib.contextmanager
def staged_folder(out: Path) -> Iterator[Path]:
    """Yield an empty folder beside ``out``. If the block succeeds, sync and rename it to ``out``; otherwise remove it.

    A lock keeps a second writer out, and the next writer removes what a killed one has left. Raises `FolderBusy` while
    another process writes the folder, `UserError` if ``out`` exists or cannot be written.
    """
    refuse_existing(out)
    if out.name in ("", ".."):
        raise UserError(f"{out}: not the name of a new folder; choose another --out")
    folder, lock_path = out.with_name(f".{out.name}.partial"), out.with_name(f".{out.name}.lock")
    with contextlib.ExitStack() as stack:
        for parent in reversed([parent for parent in out.parents if not parent.exists()]):
            stack.callback(_remove_if_empty, parent)
        with explain_os_errors(out):
            out.parent.mkdir(parents=True, exist_ok=True)
            if not stack.enter_context(file_lock(lock_path, wait=False)):
                writer = "another process"
                with contextlib.suppress(FileNotFoundError):  # the writer may just have finished
                    writer = lock_path.read_text() or writer
                raise FolderBusy(f"{out}: is being written by {writer}; wait for it or choose another --out")
            stack.callback(lock_path.unlink, missing_ok=True)
            lock_path.write_text(f"process {os.getpid()} on {socket.gethostname()}")
        stack.callback(shutil.rmtree, folder, ignore_errors=True)
        refuse_existing(out)
        with explain_os_errors(folder):
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir()
        yield folder
        with explain_os_errors(out):
            for path in folder.iterdir():
                fsync_path(path)
            fsync_path(folder)
            folder.rename(out)
            fsync_path(out.parent)


def _remove_if_empty(folder: Path) -> None:
    with contextlib.suppress(OSError):
        folder.rmdir()
