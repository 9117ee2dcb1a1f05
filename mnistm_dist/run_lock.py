"""The lock of a run folder: one process, rank 0 of a run, holds a folder at a time.

It is a lease of filelock: the lock file names host, PID namespace, pid and the process's start time, and is touched
while its owner lives. On the same host a dead owner is detected at once; from another host or container, and in a copy
of the folder, by a lock file that is no longer touched. Kernel locks (flock) are not reliable on the network file
systems of clusters.
"""

from __future__ import annotations

import os
import socket
import time
from contextlib import AbstractContextManager
from pathlib import Path

from filelock import SoftFileLease, Timeout

from mnistm_dist.files import FolderBusy, explain_os_errors

LOCK_NAME = ".lock"
HEARTBEAT_SECONDS = 5.0
# How long a lock file must stay untouched before an owner on another host counts as dead.
LEASE_SECONDS = 20.0
# How long to wait for a lock whose owner lives on this host, which may be about to release it.
SAME_HOST_SECONDS = 0.3


class RunLock(AbstractContextManager["RunLock"]):
    """Hold a run folder until `release` or the end of the block.

    Raise `FolderBusy` if a live run holds it, `UserError` if it cannot be written. ``patient``: wait for an owner on
    this host, too, as long as for one elsewhere: it may be about to end.
    """

    def __init__(self, run_dir: Path, *, patient: bool = False) -> None:
        path = run_dir / LOCK_NAME
        self._lease = SoftFileLease(
            path, lease_duration=LEASE_SECONDS, heartbeat_interval=HEARTBEAT_SECONDS, thread_local=False
        )
        with explain_os_errors(f"run folder {run_dir}", advice="choose another --run-dir"):
            owner = self._lease.owner
            # Clocks of two hosts are not compared.
            lives_here = owner is not None and _has_open(owner.pid, path) and _recently_touched(path)
            # Else until a dead owner would be detected.
            wait = SAME_HOST_SECONDS if lives_here and not patient else LEASE_SECONDS + 2
            try:
                self._lease.acquire(timeout=wait, poll_interval=0.05)
            except Timeout as error:
                owner = self._lease.owner
                holder = f"pid {owner.pid} on {owner.hostname}" if owner else "another process"
                raise FolderBusy(
                    f"run folder {run_dir}: held by a live run ({holder}); wait for it to end, "
                    "or choose another --run-dir"
                ) from error

    def __exit__(self, *_: object) -> None:
        self.release()

    def release(self) -> None:
        """Release the lock, unless another run has taken it over while this process was suspended."""
        self._lease.release()


def is_held_elsewhere(run_dir: Path) -> bool:
    """Return whether a live process other than this one holds a run folder, without taking the lock.

    An owner lives if its lock file was touched in the last `LEASE_SECONDS`, by this host's clock; on this host, its
    process must exist, too.
    """
    path, host = run_dir / LOCK_NAME, socket.gethostname()
    owner = SoftFileLease(path, lease_duration=LEASE_SECONDS, thread_local=False).owner
    if owner is None or not _recently_touched(path):
        return False
    return owner.hostname != host or (owner.pid != os.getpid() and Path(f"/proc/{owner.pid}").exists())


def _recently_touched(path: Path) -> bool:
    try:
        return time.time() - path.stat().st_mtime < LEASE_SECONDS
    except FileNotFoundError:
        return False


def _has_open(pid: int, path: Path) -> bool:
    """Whether a process of this PID namespace has a file open.

    The owner of a lock has its lock file open, unless it was killed and not yet reaped. The owner of the folder that
    this one was copied from has another file open.
    """
    try:
        return any(descriptor.samefile(path) for descriptor in Path(f"/proc/{pid}/fd").iterdir())
    except OSError:
        return False
