"""A folder that appears whole or not at all: written beside its place under another name, synced, renamed at last."""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import socket
from collections.abc import Iterator
from pathlib import Path

from mnistm_dist.data.files import saying_what_fails, sync
from mnistm_dist.errors import UserError


class BeingWritten(UserError):
    """Another process is writing the folder just now."""


@contextlib.contextmanager
def staged_folder(out: Path) -> Iterator[Path]:
    """Gives an empty folder beside ``out``; syncs and renames it to ``out`` if the block ends well, else removes it.

    A lock beside it, freed by the kernel when its holder dies, keeps a second writer out; what a killed writer left
    behind is removed by the next one. Raises `BeingWritten` while another process writes it, `UserError` if ``out``
    exists or cannot be written.
    """
    refuse_existing(out)
    if out.name in ("", ".."):
        raise UserError(f"{out}: not the name of a new folder")
    folder = out.with_name(f".{out.name}.packing")
    made: list[Path] = []
    try:
        with saying_what_fails(out):
            made += [parent for parent in out.parents if not parent.exists()]
            out.parent.mkdir(parents=True, exist_ok=True)
        with _locked(out.with_name(f".{out.name}.packing.lock"), out):
            refuse_existing(out)
            try:
                with saying_what_fails(folder):
                    shutil.rmtree(folder, ignore_errors=True)
                    folder.mkdir()
                yield folder
                with saying_what_fails(out):
                    for path in folder.iterdir():
                        sync(path)
                    sync(folder)
                    folder.rename(out)
                    sync(out.parent)
            finally:
                shutil.rmtree(folder, ignore_errors=True)
    finally:
        for parent in made:
            with contextlib.suppress(OSError):
                parent.rmdir()


def refuse_existing(out: Path) -> None:
    """Raises `UserError` if there is anything at ``out``."""
    if os.path.lexists(out):
        raise UserError(f"{out}: exists already, and nothing is ever replaced: choose another name, or remove it first")


@contextlib.contextmanager
def _locked(path: Path, out: Path) -> Iterator[None]:
    while True:
        with saying_what_fails(out):
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o666)
        try:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                holder = os.pread(descriptor, 200, 0).decode("utf-8", "replace") or "another process"
                raise BeingWritten(
                    f"{out}: is being written by {holder}: wait for it, or choose another name"
                ) from error
            except OSError as error:
                path.unlink(missing_ok=True)
                raise UserError(
                    f"{path}: this file system gives no lock ({error.strerror}): write to another one"
                ) from error
            # The holder before us may have removed the file between our opening and our locking of it.
            try:
                ours = os.path.samestat(path.stat(), os.fstat(descriptor))
            except FileNotFoundError:
                ours = False
            if not ours:
                continue
            try:
                with saying_what_fails(out):
                    os.truncate(descriptor, 0)
                    os.pwrite(descriptor, f"process {os.getpid()} on {socket.gethostname()}".encode(), 0)
                yield
            finally:
                path.unlink(missing_ok=True)
            return
        finally:
            os.close(descriptor)
