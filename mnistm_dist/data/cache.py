"""The cache folder: where decoded and fetched sets lie, once per node, and who may write there.

::

    CACHE/sets/<identity>/checked.json             which files of a packed set were found whole
    CACHE/sets/<identity>/train.u8 train.json      a split, decoded, and what is known of the file
    CACHE/fetched/<address>/...                    a packed set from a server
    CACHE/downloads/<copy>/...                     a set to be packed, or MNIST, from a public server
    CACHE/*/*/about.json                           what a person wants to know of it
    CACHE/locks/...                                a lock file for each of them

Processes and jobs wait for one another at a lock file (flock), never in a collective operation: however long
one of them decodes, no collective times out. The kernel drops a lock with the process that holds it.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import shutil
import stat
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from mnistm_dist.errors import UserError, os_error_reason

CACHE_VARIABLE = "MNISTM_DIST_CACHE"
"""The environment variable that names the cache folder."""
KINDS = ("sets", "fetched", "downloads")
"""What an entry of the cache can be: what was made of a packed set here, a packed set from a server, or what is
to be packed."""

_ELSEWHERE = f"name another folder with --cache-dir or ${CACHE_VARIABLE}"
_NO_ROOM = (errno.ENOSPC, errno.EDQUOT)


def choose_cache_dir(named: str | Path | None) -> Path:
    """The cache folder: the one that is named, if any.

    Else ``$MNISTM_DIST_CACHE``; in a Slurm job a node-local folder (below ``$SLURM_TMPDIR``, ``$TMPDIR`` or
    ``/tmp``); else ``$XDG_CACHE_HOME/mnistm_dist`` or ``~/.cache/mnistm_dist``.
    """
    if named:
        return Path(named)
    if os.environ.get(CACHE_VARIABLE):
        return Path(os.environ[CACHE_VARIABLE]).expanduser()
    if "SLURM_JOB_ID" in os.environ:
        local = os.environ.get("SLURM_TMPDIR") or os.environ.get("TMPDIR") or tempfile.gettempdir()
        return Path(local) / f"mnistm_dist-{os.getuid()}"
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "mnistm_dist"


def make_entry(cache_dir: Path, kind: str, name: str, about: dict[str, str]) -> Path:
    """Makes the folder of one entry, with ``about`` in its about.json; `UserError` where it cannot be written."""
    folder = cache_dir / kind / name
    with cache_failures(folder):
        folder.mkdir(parents=True, exist_ok=True)
        card = folder / "about.json"
        text = json.dumps(about).encode()
        if not card.exists() or card.read_bytes() != text:
            write_whole(card, text)
        os.utime(card)  # `entries` tells by it when the entry was last used
    return folder


def write_whole(path: Path, data: bytes) -> None:
    """Writes a small file beside and renames it: others see the old one or the new one."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        temporary.write_bytes(data)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def entry_lock(cache_dir: Path, kind: str, name: str, *, wait: bool = True) -> Iterator[bool]:
    """Holds the lock of one entry among all processes of the node; gives whether it is held.

    ``wait=False`` gives False at once where another process holds it. Raises `UserError` where the folder
    cannot be written, knows no locks, or could have been laid out by a stranger.
    """
    # Locks lie outside of the entries and are never removed: a file that is removed while others wait for it
    # locks nothing.
    path = cache_dir / "locks" / f"{kind}-{name}"
    with cache_failures(cache_dir):
        cache_dir.mkdir(mode=0o700, parents=True, exist_ok=True)
        state = cache_dir.stat()
        if state.st_uid != os.getuid() and state.st_mode & stat.S_IWOTH:
            raise UserError(f"{cache_dir}: it belongs to another user and anyone may write there; {_ELSEWHERE}")
        path.parent.mkdir(exist_ok=True)
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        with cache_failures(path):
            held = _flock(descriptor, wait)
        yield held
    finally:
        os.close(descriptor)


def _flock(descriptor: int, wait: bool) -> bool:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except BlockingIOError:
        return False
    return True


@contextmanager
def cache_failures(path: Path, need: int | None = None) -> Iterator[None]:
    """Turns what the disk refuses into a `UserError` that names the place and, where told, the bytes that it
    needs."""
    try:
        yield
    except OSError as error:
        if error.errno in _NO_ROOM:
            needs = f", {need / 1e6:,.0f} MB are needed" if need else ""
            raise UserError(f"{path}: the disk is full{needs}: free some room, or {_ELSEWHERE}") from error
        raise UserError(f"{path}: {os_error_reason(error)}: {_ELSEWHERE}") from error


def make_room(path: Path, need: int) -> None:
    """Raises `UserError` unless the disk of the folder ``path`` has ``need`` bytes free."""
    with cache_failures(path):
        free = shutil.disk_usage(path).free
    if free < need:
        raise UserError(
            f"{path}: {free / 1e6:,.0f} MB free, {need / 1e6:,.0f} MB are needed: free some room, or {_ELSEWHERE}"
        )


@dataclass(frozen=True, kw_only=True)
class Entry:
    """One set in the cache."""

    kind: str
    """One of `KINDS`."""
    path: Path
    size: int
    """Bytes of all its files."""
    used: float
    """When it was last opened, seconds since 1970."""
    about: dict[str, str]
    """What was known of it when it was made: ``description``, ``source``, ``identity``."""


def entries(cache_dir: Path) -> list[Entry]:
    """Everything in the cache, the last used first."""
    found = []
    for kind in KINDS:
        for folder in sorted((cache_dir / kind).glob("*/")):
            files = [state for file in folder.rglob("*") if (state := _file_state(file)) is not None]
            found.append(
                Entry(
                    kind=kind,
                    path=folder,
                    size=sum(state.st_size for state in files),
                    used=max((state.st_mtime for state in files), default=0.0),
                    about=_read_card(folder / "about.json"),
                )
            )
    return sorted(found, key=lambda entry: -entry.used)


def _file_state(path: Path) -> os.stat_result | None:
    """What stat says of a file; None of a folder, and of what a process has just renamed or removed."""
    try:
        state = path.stat()
    except FileNotFoundError:
        return None
    return state if stat.S_ISREG(state.st_mode) else None


def _read_card(path: Path) -> dict[str, str]:
    try:
        card = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError):
        return {}
    return {str(name): str(value) for name, value in card.items()} if isinstance(card, dict) else {}


def clear(entry: Entry) -> bool:
    """Removes one entry; gives False where a process is just filling it. Processes that have mapped it keep
    what they have.

    Raises `UserError` where it cannot be removed.
    """
    with entry_lock(entry.path.parents[1], entry.kind, entry.path.name, wait=False) as held:
        if held:
            with cache_failures(entry.path):
                shutil.rmtree(entry.path)
    return held
