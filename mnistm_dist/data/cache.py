"""The cache folder: decoded and fetched sets, once per node, and who may write there.

::

    CACHE/sets/<identity>/checked.json             which files were found intact: shards, and decoded splits
    CACHE/sets/<identity>/train.u8                 a decoded split
    CACHE/fetched/<address>/...                    a packed set from a server
    CACHE/downloads/<copy>/...                     a set to pack, or MNIST, from a public server
    CACHE/*/*/about.json                           a description for `python -m mnistm_dist.cache list`
    CACHE/locks/...                                a lock file for each of them

Processes and jobs wait for one another at a lock file, never in a collective operation: no collective times out,
however long one of them decodes.
"""

import errno
import json
import os
import shutil
import stat
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from pydantic import TypeAdapter, ValidationError

from mnistm_dist.errors import UserError
from mnistm_dist.files import explain_os_errors, file_lock, write_atomic

CACHE_VARIABLE = "MNISTM_DIST_CACHE"  # the environment variable that names the cache folder
# Kinds of entries: what was made of a packed set here, a packed set from a server, files to be packed.
KINDS = ("sets", "fetched", "downloads")
_ELSEWHERE = f"name another folder with --cache-dir or ${CACHE_VARIABLE}"


def choose_cache_dir(named: str | Path | None) -> Path:
    """Return the cache folder: ``named`` if given.

    Otherwise ``$MNISTM_DIST_CACHE``; in a Slurm job a node-local folder (below ``$SLURM_TMPDIR``, ``$TMPDIR`` or
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


@contextmanager
def cache_entry(cache_dir: Path, kind: str, name: str, about: dict[str, str]) -> Iterator[Path]:
    """Hold the lock of an entry among all processes of the node, and yield its folder, described by ``about``.

    Raises `UserError` if the cache folder cannot be written or a stranger could have planted files in it.
    """
    folder = cache_dir / kind / name
    with _entry_lock(cache_dir, kind, name):
        with cache_errors(folder):
            folder.mkdir(parents=True, exist_ok=True)
            write_atomic(folder / "about.json", json.dumps(about))  # its mtime is the time of the last use
        yield folder


@contextmanager
def _entry_lock(cache_dir: Path, kind: str, name: str, *, wait: bool = True) -> Iterator[bool]:
    locks = cache_dir / "locks"
    with ExitStack() as stack:
        with cache_errors(cache_dir):
            cache_dir.mkdir(mode=0o700, parents=True, exist_ok=True)
            state = cache_dir.stat()
            if state.st_uid != os.getuid() and state.st_mode & stat.S_IWOTH:
                raise UserError(f"{cache_dir}: belongs to another user and anyone may write there; {_ELSEWHERE}")
            locks.mkdir(exist_ok=True)
            held = stack.enter_context(file_lock(locks / f"{kind}-{name}", wait=wait))
        yield held


@contextmanager
def cache_errors(path: Path, need: int = 0) -> Iterator[None]:
    """Turn an `OSError` of the block into a `UserError` that names ``path`` and the ``need``: bytes that it will write.

    Raises `UserError` at once if the disk has less free; then the folder of ``path`` must exist.
    """
    needed = f"{need / 1e6:,.0f} MB are needed: " if need else ""
    with explain_os_errors(path, advice=f"{needed}free some space or {_ELSEWHERE}"):
        if need and shutil.disk_usage(path.parent).free < need:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        yield


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
    """What was known when it was made: ``description``, ``source``, ``identity``."""


def entries(cache_dir: Path) -> list[Entry]:
    """Return all entries of the cache, the last used first."""
    found = []
    for folder in (folder for kind in KINDS for folder in (cache_dir / kind).glob("*/")):
        used, about = 0.0, {}
        with suppress(OSError, ValidationError):
            used = (folder / "about.json").stat().st_mtime
            about = TypeAdapter(dict[str, str]).validate_json((folder / "about.json").read_bytes())
        size = sum(map(_size, folder.rglob("*")))
        found.append(Entry(kind=folder.parent.name, path=folder, size=size, used=used, about=about))
    return sorted(found, key=lambda entry: (-entry.used, entry.path))


def _size(path: Path) -> int:
    try:
        return path.stat().st_size if path.is_file() else 0
    except FileNotFoundError:
        return 0  # a process has just renamed or removed it


def clear(entry: Entry) -> bool:
    """Remove an entry and return whether it was; an entry that a process is filling is kept.

    Processes that have mapped its files keep what they have. Raises `UserError` if it cannot be removed.
    """
    with _entry_lock(entry.path.parents[1], entry.kind, entry.path.name, wait=False) as held:
        if held:
            with explain_os_errors(entry.path, verb="removed", advice="check its owner and permissions"):
                shutil.rmtree(entry.path)
    return held
