"""Faults that a test puts under a run, in its own process: `processes.py` calls one of these before the door."""

from __future__ import annotations

import ctypes
import os
from pathlib import Path
from typing import Any

from mnistm_dist import loop
from mnistm_dist.errors import UserError

CLONE_NEWNS, MS_RDONLY, MS_REC, MS_PRIVATE = 0x20000, 1, 0x4000, 0x40000


def read_only_disk() -> None:
    """The folder ``disk`` is a file system that cannot be written."""
    _mount("disk", "size=64m", MS_RDONLY)


def full_disk() -> None:
    """The folder ``disk`` has room for not even a small file."""
    _mount("disk", "size=4k")
    Path("disk/filling").write_bytes(bytes(4096))


def small_disk() -> None:
    """The folder ``disk`` has room for a run's small files, and for no checkpoint."""
    _mount("disk", "size=1m")


def _mount(folder: str, options: str, flags: int = 0) -> None:
    """Mounts a tmpfs in a mount namespace of this process, with which it ends."""
    libc = ctypes.CDLL(None, use_errno=True)
    for failed in (
        libc.unshare(CLONE_NEWNS),
        libc.mount(b"none", b"/", None, MS_REC | MS_PRIVATE, None),
        libc.mount(b"tmpfs", folder.encode(), b"tmpfs", flags, options.encode()),
    ):
        if failed:
            raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))


def mistake_on_rank_0() -> None:
    """Rank 0 finds a mistake where the others find none, in the middle of the training."""
    original = loop.Trainer.write_row

    def write_row(self: loop.Trainer, *arguments: Any) -> None:
        original(self, *arguments)
        if self.world.is_main:
            raise UserError("a mistake that only rank 0 finds")

    loop.Trainer.write_row = write_row  # type: ignore[method-assign]
